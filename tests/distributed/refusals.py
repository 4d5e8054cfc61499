"""What processes do wrong, and what the error must say on each of them."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import lrkfac
from tests.distributed.processes import outcome

SHORT = timedelta(seconds=3)
INPUTS, TARGETS = torch.linspace(-1, 1, 24).reshape(4, 6), torch.tensor([0, 1, 2, 0])


class Fault(NamedTuple):
    """A call that must fail on both of two processes, and the words of the errors."""

    call: Callable[[int, Any], Any]
    words: tuple[str, ...]


def network(seed: int = 0, width: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


def evaluated(
    group: Any, params: Any = None, targets: Any = TARGETS, likelihood: Any = None, net: Any = None,
    options: Any = None, estimator: Any = "mc", **call: Any,
) -> Any:  # fmt: skip
    """An evaluation of this process' part."""
    model, own = lrkfac.from_module(net or network())
    layers = lrkfac.find_layers(model, own, INPUTS, **(options or {}))
    evaluate = lrkfac.evaluator(model, likelihood or lrkfac.categorical(), layers, estimator, group=group)
    return evaluate(own if params is None else params, INPUTS[: len(targets)], targets, **call)


def updated(group: Any, rank: int) -> Any:
    evaluation = evaluated(group)
    model, params = lrkfac.from_module(network())
    tx = lrkfac.low_rank_kfac(lrkfac.find_layers(model, params, INPUTS), 0.1, rank=rank)
    return tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)


def later(rank: int, group: Any) -> Any:
    """A target that one process alone refuses, after an evaluation in which nothing was wrong."""
    model, params = lrkfac.from_module(network())
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), lrkfac.find_layers(model, params, INPUTS), group=group)
    evaluate(params, INPUTS, TARGETS)
    return evaluate(params, INPUTS, TARGETS + 7 * rank)


def later_statistics(rank: int, group: Any) -> Any:
    model, params = lrkfac.from_module(network())
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), lrkfac.find_layers(model, params, INPUTS), group=group)
    evaluate(params, INPUTS, TARGETS)
    return evaluate(params, INPUTS, TARGETS, statistics=rank == 1)


def later_parameters(rank: int, group: Any) -> Any:
    """Another tree on one process, after an evaluation in which nothing was wrong."""
    model, params = lrkfac.from_module(network())
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), lrkfac.find_layers(model, params, INPUTS), group=group)
    evaluate(params, INPUTS, TARGETS)
    return evaluate({} if rank else params, INPUTS, TARGETS)


def twice(rank: int, group: Any) -> Any:
    """Evaluations of the joint batch are summed already."""
    return lrkfac.merge_evaluations([evaluated(group), evaluated(group)], group=group)


def alone(rank: int, group: Any) -> Any:
    """The first process waits for the second, which has an error of its own."""
    if rank:
        raise ValueError("targets: an error of rank 1 alone")
    return evaluated(group)


def apart(rank: int, group: Any) -> Any:
    """A group in one process, none in the other, which goes on to what comes next and waits there."""
    evaluated(group if rank == 0 else None)
    if rank:
        raise RuntimeError("rank 1 has no group")


IGNORING = lrkfac.categorical(ignore_index=-100)
FAULTS = {
    "parameters": Fault(
        lambda rank, group: evaluated(group, params=lrkfac.from_module(network(rank))[1]),
        ("rank 1", "params", "0.bias"),
    ),
    "parameters of a module": Fault(
        lambda rank, group: lrkfac.LowRankKFAC(network(rank), lrkfac.categorical(), INPUTS, lr=0.1, group=group),
        ("rank 1", "module", "0.bias"),
    ),
    "shapes": Fault(lambda rank, group: evaluated(group, net=network(width=5 + rank)), ("rank 1", "layer 0", "B 6")),
    "layers": Fault(
        lambda rank, group: evaluated(group, options={"bias": "separate" if rank else "joint"}),
        ("rank 1", "layer 0", "A 6"),
    ),
    "estimators": Fault(
        lambda rank, group: evaluated(group, estimator=("mc", "exact")[rank]), ("rank 1", "estimator", "exact")
    ),
    "likelihoods": Fault(
        lambda rank, group: evaluated(group, likelihood=lrkfac.categorical(label_smoothing=0.1 * rank)),
        ("rank 1", "likelihood", "label_smoothing=0.1"),
    ),
    "parameters, later": Fault(later_parameters, ("rank 1 failed", "params", "missing")),
    "structures": Fault(lambda rank, group: updated(group, 2 + rank), ("rank 1", "structure of '0'", "A rank 3")),
    "statistics": Fault(lambda rank, group: evaluated(group, statistics=rank == 0), ("rank 1", "statistics=False")),
    "statistics, later": Fault(later_statistics, ("rank 1", "statistics=True")),
    "names": Fault(lambda rank, group: evaluated(group, layers=(("0",), ("2",))[rank]), ("rank 1", "layers=('2',)")),
    "targets of one": Fault(
        lambda rank, group: evaluated(group, targets=TARGETS + 7 * rank), ("rank 1 failed", "targets", "got 7")
    ),
    "targets of one, later": Fault(later, ("rank 1 failed", "targets", "got 7")),
    "ignored everywhere": Fault(
        lambda rank, group: evaluated(group, likelihood=IGNORING, targets=torch.full((4,), -100)),
        ("something counts", "2 ranks"),
    ),
    "empty everywhere": Fault(
        lambda rank, group: evaluated(group, targets=TARGETS[:0]), ("something counts", "2 ranks")
    ),
    "twice": Fault(twice, ("group: expected none",)),
    "outside": Fault(
        lambda rank, group: evaluated([dist.new_group([1]), dist.new_group([0])][rank]), ("group", "without rank")
    ),
    "no group": Fault(lambda rank, group: evaluated("WORLD"), ("group", "'WORLD'")),
    # At the end: these wait for the timeout.
    "an error on one alone": Fault(alone, ("rank",)),
    "a group on one alone": Fault(apart, ("rank",)),
}
WAITING = "an error on one alone", "a group on one alone"
"""Of these the second process has an error of its own; the first one's says what it waited for."""


def every_refusal() -> dict[str, str]:
    """The error of each fault in this process; each has a group of its own, which it may leave in disorder."""
    found = {}
    for name, fault in FAULTS.items():
        group = dist.new_group(timeout=SHORT)
        found[name] = outcome(lambda: fault.call(dist.get_rank(), group))  # noqa: B023
    return found
