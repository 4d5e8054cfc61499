"""Steps of K-FAC by independent libraries, where these are installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.networks import Work, mean_loss

DAMPING, DECAY, RATE, MOMENTUM = 1e-2, 0.95, 1e-6, 0.9


def asdl(work: Work) -> Callable[[bool], Any]:
    """ASDL (``asdfghjkl``): dense factors, their inverses by Cholesky."""
    from asdl import FISHER_MC, KfacGradientMaker, PreconditioningConfig

    module, optimizer = _copied(work)
    config = PreconditioningConfig(
        data_size=len(work.inputs), damping=DAMPING, ema_decay=1 - DECAY, preconditioner_upd_interval=2
    )
    maker = KfacGradientMaker(module, config, fisher_type=FISHER_MC)

    def step(refresh: bool) -> None:
        maker.state["step"] = 0 if refresh else 1
        optimizer.zero_grad()
        outputs = maker.setup_model_call(module, work.inputs)
        maker.setup_loss_call(F.cross_entropy, outputs, work.targets)
        with patch("torch.cuda.nvtx.range", lambda *args: nullcontext()):  # a torch without CUDA has none
            maker.forward_and_backward()
        optimizer.step()

    return step


def curvlinops(work: Work) -> Callable[[bool], Any]:
    """curvlinops: dense factors of the batch, without an average, their inverses by Cholesky."""
    from curvlinops import FisherType, KFACInverseLinearOperator, KFACLinearOperator

    module, optimizer = _copied(work)
    covered = [p for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d) for p in part.parameters()]
    inverses: list[Any] = []

    def step(refresh: bool) -> None:
        optimizer.zero_grad()
        mean_loss(module(work.inputs), work.targets).backward()
        if refresh:
            factors = KFACLinearOperator(
                module, nn.CrossEntropyLoss(), covered, [(work.inputs, work.targets)], check_deterministic=False,
                fisher_type=FisherType.MC, separate_weight_and_bias=False,
            )  # fmt: skip
            inverses[:] = [KFACInverseLinearOperator(factors, damping=DAMPING, use_heuristic_damping=True)]
        natural = inverses[0] @ [p.grad for p in covered]
        for parameter, gradient in zip(covered, natural, strict=True):
            parameter.grad = gradient
        optimizer.step()

    return step


LIBRARIES: dict[str, tuple[str, Callable[[Work], Callable[[bool], Any]]]] = {
    "ASDL": ("asdl", asdl),
    "curvlinops": ("curvlinops", curvlinops),
}
"""By label: the module to import, and ``work -> step(refresh)``."""


def steps_of_libraries(work: Work) -> tuple[dict[str, Callable[[bool], Any]], dict[str, str]]:
    """Return steps by label, after one refresh, and by label why others cannot run."""
    steps, missing = {}, {}
    for label, (package, make) in LIBRARIES.items():
        if find_spec(package) is None:
            missing[label] = "not installed"
            continue
        try:
            step = _quiet(make)(work)
            step(True)
            step(False)
        except Exception as error:  # whatever a library makes of a network that it does not support
            missing[label] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            steps[label] = step
    return steps, missing


def _quiet(make: Callable[[Work], Callable[[bool], Any]]) -> Callable[[Work], Callable[[bool], Any]]:
    """Silence a library: torch warns of the hooks that it registers, and tests make errors of warnings."""

    def quiet(function: Callable[[Any], Any], argument: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(argument)

    return lambda work: partial(quiet, quiet(make, work))


def _copied(work: Work) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = deepcopy(work.module)
    return module, torch.optim.SGD(module.parameters(), lr=RATE, momentum=MOMENTUM)
