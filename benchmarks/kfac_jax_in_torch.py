"""Trainings by lrkfac, and by ASDL and curvlinops where they are installed, beside functional SGD in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import grad

import lrkfac
from benchmarks.common import synchronize
from benchmarks.kfac_jax_rounds import COMPILED, DAMPING, MOMENTUM, RATE, SGD, Batch, Framework, Network, Training
from benchmarks.libraries import steps_of_libraries


def framework(network: Network, settings: dict[str, Any]) -> Framework:
    """Compiled, all steps of lrkfac but those with dense factors, and no library."""
    compiled, every, rank = settings["framework"] == COMPILED, settings["every"], settings["rank"]
    layers = lrkfac.find_layers(network.model, network.params, next(network.batches)[0], strict=True)
    chains = {
        f"rank {rank}": lambda: lrkfac.low_rank_kfac(layers, RATE, rank, DAMPING, momentum=MOMENTUM),
        f"rank {rank}, adaptive": lambda: lrkfac.adaptive_low_rank_kfac(layers, rank=rank),
    }
    if not compiled:
        chains["dense"] = lambda: lrkfac.kfac(layers, RATE, DAMPING, momentum=MOMENTUM)
    makers: dict[str, Callable[[], Training]] = {SGD: lambda: sgd(network, compiled)}
    makers |= {name: partial(_by_chain, network, layers, make, every, compiled) for name, make in chains.items()}
    missing: dict[str, str] = {}
    if network.module is not None and not compiled:
        others, missing = steps_of_libraries(network.module)
        makers |= {name: partial(_by_library, step, every) for name, step in others.items()}
    device = torch.device(settings["device"])

    def wait(result: Any) -> Any:
        synchronize(device)
        return result

    return Framework(makers, missing, wait, lambda batch: batch, total)


def sgd(network: Network, compiled: bool = False) -> Training:
    """Without momentum."""

    def step(params: Any, inputs: Tensor, targets: Tensor) -> Any:
        def loss(params: Any) -> Tensor:
            return network.likelihood.negative_log_likelihood(network.model(params, inputs), targets).mean()

        return optree.tree_map(lambda p, g: p - RATE * g, params, grad(loss)(params))

    run = torch.compile(step, fullgraph=True, dynamic=False) if compiled else step
    return Training(lambda params, state, number, batch: (run(params, *batch), state), network.params)


def _by_chain(
    network: Network,
    layers: lrkfac.Layers,
    make: Callable[[], lrkfac.GradientTransformation],
    every: int,
    compiled: bool,
) -> Training:
    tx, evaluate = make(), lrkfac.evaluator(network.model, network.likelihood, layers)

    def step(params: Any, state: Any, inputs: Tensor, targets: Tensor, statistics: bool) -> tuple[Any, Any]:
        evaluation = evaluate(params, inputs, targets, statistics=statistics)
        updates, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        return lrkfac.apply_updates(params, updates), state

    run = torch.compile(step, fullgraph=True, dynamic=False) if compiled else step

    def numbered(params: Any, state: Any, number: int, batch: Batch) -> tuple[Any, Any]:
        return run(params, state, *batch, number % every == 0)

    return Training(numbered, network.params, tx.init(network.params))


def _by_library(step: Callable[[bool], Any], every: int) -> Training:
    """It keeps a copy of the parameters, and one batch, to itself."""

    def numbered(params: Any, state: Any, number: int, batch: Batch) -> tuple[Any, Any]:
        step(number % every == 0)
        return params, state

    return Training(numbered, ())


def total(params: Any) -> float:
    """The sum of all numbers."""
    return sum(x.double().sum().item() for x in optree.tree_leaves(params))
