"""Trainings that several processes must do as one does: the same numbers, from parts of the same batches."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import optree
import torch
import torch.distributed as dist

import lrkfac
from lrkfac.core.base.processes import counted
from lrkfac.structures import dense, diagonal, full, kronecker, layer_wise, low_rank, low_rank_plus_diagonal, unit_wise
from tests.distributed.networks import IGNORED, NETWORKS

STEPS, EVERY = 10, 3
"""Steps of a training, and from one refresh to the next."""
RANK = 3
STEADY = lrkfac.QuadraticModelOptions(start_steps=0.0)
"""The large changes of the dampings at the start make small ones, with which rounding grows: equal to 3e-5 alone."""


def preconditioned(structure: Any) -> Callable[[lrkfac.Layers], lrkfac.GradientTransformation]:
    def make(layers: lrkfac.Layers) -> lrkfac.GradientTransformation:
        return lrkfac.chain(
            lrkfac.precondition_by_fisher(layers, structure, damping=0.1, decay=0.8),
            lrkfac.clip_by_kl(0.01, 0.1),
            lrkfac.trace(0.5),
            lrkfac.scale_by_learning_rate(0.1),
        )

    return make


LOW_RANK = low_rank(RANK), low_rank_plus_diagonal(RANK)
CHAINS = {
    "low rank": lambda layers: lrkfac.low_rank_kfac(layers, 0.1, rank=RANK, damping=0.1, kl_clip=0.01),
    "adaptive": lambda layers: lrkfac.adaptive_low_rank_kfac(layers, rank=RANK, dense_up_to=0, options=STEADY),
    "spectral": lambda layers: lrkfac.spectral_kfac(layers, 0.01, rank=RANK),
    "spectral, no rate": lambda layers: lrkfac.spectral_kfac(layers, rank=RANK),
    "dense": lambda layers: lrkfac.kfac(layers, 0.1, damping=0.1, kl_clip=0.01),
    "corrected": preconditioned(kronecker(*LOW_RANK, corrected=True)),
    "corrected, dense": preconditioned(kronecker(dense(), dense(), corrected=True)),
    "exactly damped": preconditioned(kronecker(*LOW_RANK, exact_damping=True)),
    "reduce": preconditioned(kronecker(*LOW_RANK, treatment="reduce")),
    "power": preconditioned(kronecker(low_rank(RANK, method="power"), dense())),
    "two iterations": preconditioned(kronecker(low_rank(RANK, iterations=2), diagonal())),
    "unit-wise": preconditioned(unit_wise()),
    "layer-wise": preconditioned(layer_wise()),
    "diagonal": preconditioned(lrkfac.structures.diagonal()),
    "full": preconditioned(full()),
}


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        network: One of ``NETWORKS``.
        chain: One of ``CHAINS``.
        parts: The number of examples of each process.
        estimator: See ``evaluator``.
        dtype: Of parameters and inputs.
        thin: See ``evaluator``.
        pieces: The number of micro-batches of each process.
        silent: A process whose targets are all ignored.
        drawn: Whether random numbers come from torch's generator; processes then take turns at the examples.
    """

    network: str
    chain: str = "low rank"
    parts: tuple[int, ...] = (9, 7)
    estimator: str = "mc"
    dtype: torch.dtype = torch.float64
    thin: bool = False
    pieces: int = 1
    silent: int | None = None
    drawn: bool = False

    def __str__(self) -> str:
        words = [self.network, self.chain, self.estimator, "+".join(map(str, self.parts)), str(self.dtype)[6:]]
        words += ["thin"] * self.thin + ["drawn"] * self.drawn + [f"{self.pieces} pieces"] * (self.pieces > 1)
        return ", ".join(words + [f"{self.silent} silent"] * (self.silent is not None))


TWO = (
    *(Case(network, chain) for network in ("mlp", "conv", "gpt", "shared")
      for chain in ("low rank", "dense", "corrected", "adaptive", "unit-wise", "diagonal")),
    *(Case(network, "reduce") for network in ("conv", "gpt", "shared")),
    *(Case("mlp", chain)
      for chain in ("corrected, dense", "exactly damped", "power", "two iterations", "layer-wise", "full")),
    *(Case(network, chain, estimator=estimator) for network in ("mlp", "gpt") for chain in ("low rank", "corrected")
      for estimator in ("exact", "empirical", "forward_only") if (chain, estimator) != ("corrected", "forward_only")),
    *(Case(network, chain, dtype=torch.float32) for network in ("mlp", "conv", "gpt", "shared")
      for chain in ("low rank", "adaptive")),
    *(Case("wide", chain, (8, 8), thin=True) for chain in ("low rank", "adaptive")),
    *(Case("wide", "low rank", (5, 4), thin=True, estimator=estimator) for estimator in ("mc", "empirical")),
    *(Case("mlp", chain, (9, 6), pieces=3) for chain in ("low rank", "adaptive")),
    Case("gpt", "low rank", (6, 6), pieces=2),
    *(Case(network, "spectral") for network in ("mlp", "gpt")),
    *(Case("wide", chain, (8, 8), thin=True) for chain in ("spectral", "spectral, no rate")),
    Case("heads"),
    *(Case(network, chain, (8, 8), drawn=True) for network, chain in (("gpt", "low rank"), ("heads", "adaptive"))),
    Case("conv, train", "low rank", (8, 8)),
)  # fmt: skip
FOUR = (
    *(Case(network, "low rank", (5, 9, 2, 1)) for network in ("mlp", "conv", "gpt", "shared", "heads")),
    *(Case(network, "adaptive", (5, 9, 2, 1)) for network in ("mlp", "heads")),
    *(Case("mlp", chain, (5, 9, 2, 1)) for chain in ("dense", "corrected", "unit-wise", "full")),
    *(Case("gpt", chain, (5, 9, 2, 1), silent=2) for chain in ("adaptive", "corrected")),
    *(Case(network, "low rank", (4, 6, 0, 3)) for network in ("mlp", "conv", "gpt")),
    Case("mlp", "adaptive", (4, 6, 0, 3)),
    Case("heads", "low rank", (5, 9, 2, 1), silent=1),
    Case("mlp", "low rank", (5, 9, 2, 1), dtype=torch.float32),
    Case("mlp", "corrected", (4, 4, 4, 4), drawn=True),
)  # fmt: skip
CASES = {2: TWO, 4: FOUR}


def batch_of(case: Case, step: int) -> tuple[Any, Any, Any]:
    """Inputs, targets and noise of the joint batch."""
    network, generator = NETWORKS[case.network], torch.Generator().manual_seed(step)
    n = sum(case.parts)
    inputs, targets = network.draw(generator, n, case.dtype)
    if case.silent is not None:
        start = sum(case.parts[: case.silent])
        of_class = targets["class"] if isinstance(targets, dict) else targets
        of_class[start : start + case.parts[case.silent]] = IGNORED
    shapes = {"gpt": (n, *inputs.shape[1:], 9), "heads": {"class": (n, 3), "value": (n, 2)}}.get(case.network, (n, 3))
    noise = optree.tree_map(
        lambda shape: torch.rand(1, *shape, generator=generator, dtype=torch.float64).to(case.dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return inputs, targets, noise if case.estimator == "mc" and not case.drawn else None


def cut(tree: Any, part: slice, axis: int = 0) -> Any:
    """The part of the examples of a tree."""
    return optree.tree_map(lambda x: x.movedim(axis, 0)[part].movedim(0, axis), tree)


def train(case: Case, group: Any = None) -> dict[str, Any]:
    """Parameters at the end, losses, and the calls of the last refresh and the last plain step."""
    torch.manual_seed(1)
    network = NETWORKS[case.network]
    model, params = lrkfac.from_module(network.module().to(case.dtype))
    layers = lrkfac.find_layers(model, params, network.draw(torch.Generator().manual_seed(0), 4, case.dtype)[0])
    evaluate = lrkfac.evaluator(
        model, network.likelihood, layers, case.estimator, thin=case.thin, group=None if case.pieces > 1 else group
    )
    tx = CHAINS[case.chain](layers)
    state, losses, calls = tx.init(params), [], {}
    for step in range(STEPS):
        statistics = step % EVERY == 0
        with counted() as made:
            evaluations = [
                evaluate(params, cut(inputs, piece), cut(targets, piece), statistics, noise=cut(noise, piece, 1))
                for inputs, targets, noise in [batch_of(case, step)]
                for piece in pieces_of(case, group)
            ]
            if case.pieces > 1:
                evaluations = [lrkfac.merge_evaluations(evaluations, group=group)]
            updates, state = tx.update(evaluations[0].grads, state, params, evaluation=evaluations[0])
        params = lrkfac.apply_updates(params, updates)
        losses.append(evaluations[0].loss)
        calls["refresh" if statistics else "step"] = list(made)
    flat = torch.cat([x.detach().flatten() for x in params.values()])
    return {"params": flat, "losses": torch.stack(losses).detach(), "calls": calls}


def pieces_of(case: Case, group: Any) -> list[slice]:
    """The examples of each micro-batch of this process; those of all processes where there is no group."""
    if group is None:
        return pieces_between(0, sum(case.parts), case.pieces)
    rank = dist.get_rank(group)
    if case.drawn:
        return [slice(rank, None, len(case.parts))]
    start = sum(case.parts[:rank])
    return pieces_between(start, start + case.parts[rank], case.pieces)


def pieces_between(start: int, end: int, pieces: int) -> list[slice]:
    bounds = [start + (end - start) * i // pieces for i in range(pieces + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def every_case() -> dict[str, dict[str, Any]]:
    """Train each case in all processes; the processes share in the references, each of one process alone."""
    group, world = dist.group.WORLD, dist.get_world_size()
    results = {str(case): attempt(lambda case=case: train(case, group)) for case in CASES[world]}
    for i, case in enumerate(CASES[world]):
        if i % world == dist.get_rank():
            results[str(case)] |= {"alone": attempt(lambda case=case: train(case))}
    return results


def attempt(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result, or the traceback of an error: it is a failure of this case and not of the others."""
    try:
        return function()
    except Exception:
        return {"error": traceback.format_exc()}
