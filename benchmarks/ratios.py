"""Steps of all methods on one network, timed in turn beside an SGD step, and the least that each can take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.func import grad

import lrkfac
from benchmarks.common import interleaved, median_ratios, peak_bytes
from benchmarks.floors import Rates, cost
from benchmarks.libraries import steps_of_libraries
from benchmarks.networks import Work, mean_loss
from lrkfac.transforms.precondition_state import PreconditionState

SGD, MOMENTUM, DENSE, ADAPTIVE = "SGD", "SGD, momentum", "dense K-FAC", "adaptive"
GRADIENT, EMPIRICAL = "gradient", "gradient, empirical statistics"
DAMPING, RATE = 1e-2, 0.1
COSTLY_REPEATS = 5
"""Timings of the steps with dense factors are fewer by this."""


@dataclass(frozen=True)
class Choice:
    """What is compared.

    Attributes:
        ranks: Of low-rank K-FAC.
        every: Steps from one refresh to the next.
        repeats: Timings of each step.
        compiled: Whether all steps are compiled; then dense factors and libraries are left out.
        dense: Whether dense K-FAC and other libraries take part.
        variants: Whether the first rank is also timed with formed gradients, without momentum, with weight decay.
        capture: Whether the gradient alone is timed with and without empirical statistics.
        adaptive: Whether the adaptive chain takes part, with the first rank.
        peaks: Whether the most bytes are noted that a step allocates beyond parameters, batch and state.
    """

    ranks: Sequence[int] = (32,)
    every: int = 10
    repeats: int = 10
    compiled: bool = False
    dense: bool = False
    variants: bool = False
    capture: bool = False
    adaptive: bool = False
    peaks: bool = False


class Method(NamedTuple):
    """Functions that take one step, and what each reads; ``again`` is what is read twice."""

    plain: Callable[[], Any]
    reads: Any = None
    refresh: Callable[[], Any] | None = None
    refresh_reads: Any = None
    again: Any = ()


class Functional:
    """A network as a pure function, its batch, and the methods' steps; each starts from the same parameters."""

    def __init__(self, work: Work) -> None:
        self.has_aux = any(True for _ in work.module.buffers())
        if self.has_aux:
            self.model, self.params, buffers = lrkfac.from_module(work.module, buffers=True)
            self.inputs: Any = (buffers, work.inputs)
        else:
            self.model, self.params = lrkfac.from_module(work.module)
            self.inputs = work.inputs
        self.targets = work.targets
        self.batch = (self.inputs, self.targets)
        self.layers = lrkfac.find_layers(self.model, self.params, self.inputs)

    def gradient(self, params: Any) -> Any:
        """The plain functional gradient, and the buffers after the step."""

        def loss(params: Any) -> tuple[Tensor, Any]:
            outputs, aux = self.model(params, self.inputs) if self.has_aux else (self.model(params, self.inputs), ())
            return mean_loss(outputs, self.targets), aux

        return grad(loss, has_aux=True)(params)

    def evaluator(self, estimator: str = "mc", thin: bool = True) -> Any:
        """``evaluator`` of the network."""
        likelihood = lrkfac.categorical()
        return lrkfac.evaluator(self.model, likelihood, self.layers, estimator, has_aux=self.has_aux, thin=thin)

    def sgd(self) -> Method:
        """Without momentum."""

        def step() -> Any:
            grads, aux = self.gradient(self.params)
            return optree.tree_map(lambda p, g: p - RATE * g, self.params, grads), aux

        return Method(step, (self.params, self.batch), again=self.params)

    def first_order(self, tx: lrkfac.GradientTransformation) -> Method:
        """By a chain that needs gradients alone."""
        state = tx.init(self.params)

        def step() -> Any:
            grads, aux = self.gradient(self.params)
            updates, new = tx.update(grads, state, self.params)
            return lrkfac.apply_updates(self.params, updates), new, aux

        return Method(step, (self.params, self.batch, state), again=self.params)

    def kfac(self, tx: lrkfac.GradientTransformation, thin: bool = True) -> Method:
        """By a chain that preconditions, after its first refresh."""
        evaluate = self.evaluator(thin=thin)
        first = evaluate(self.params, *self.batch)
        state = tx.update(first.grads, tx.init(self.params), self.params, evaluation=first)[1]
        del first

        def step(refresh: bool) -> Any:
            e = evaluate(self.params, *self.batch, statistics=refresh)
            updates, new = tx.update(e.grads, state, self.params, evaluation=e)
            return lrkfac.apply_updates(self.params, updates), new, e.aux

        rest = (self.params, self.batch)
        return Method(
            partial(step, False), (*rest, _without(state, "average")),
            partial(step, True), (*rest, _without(state, "inverse")), self.params,
        )  # fmt: skip

    def low_rank(self, rank: int, thin: bool = True, **options: Any) -> Method:
        """By ``low_rank_kfac``."""
        return self.kfac(lrkfac.low_rank_kfac(self.layers, RATE, rank, DAMPING, **options), thin)

    def captures(self) -> dict[str, Method]:
        """The gradient, without and with empirical statistics."""
        evaluate = self.evaluator("empirical", thin=False)

        def empirical() -> Any:
            e = evaluate(self.params, *self.batch)
            return e.grads, e.aux, e.statistics

        empirical()  # the first call looks for shapes, by operations that would be counted
        reads = (self.params, self.batch)
        return {GRADIENT: Method(lambda: self.gradient(self.params), reads, again=self.params),
                EMPIRICAL: Method(empirical, reads, again=self.params)}  # fmt: skip


def _without(state: tuple[Any, ...], field: str) -> tuple[Any, ...]:
    def one(state: PreconditionState) -> PreconditionState:
        return state._replace(blocks={name: block._replace(**{field: ()}) for name, block in state.blocks.items()})

    return tuple([one(s) if isinstance(s, PreconditionState) else s for s in state])


def low_rank(rank: int) -> str:
    """The name of a row."""
    return f"rank {rank}"


def methods(work: Work, choice: Choice) -> tuple[dict[str, Method], dict[str, Method], dict[str, str]]:
    """Those that are cheap, those that are not, and why others are missing."""
    functional = Functional(work)
    momentum = lrkfac.chain(lrkfac.trace(0.9), lrkfac.scale_by_learning_rate(RATE))
    cheap = {SGD: functional.sgd(), MOMENTUM: functional.first_order(momentum)}
    for rank in choice.ranks:
        cheap[low_rank(rank)] = functional.low_rank(rank)
    if choice.variants:
        name, rank = low_rank(choice.ranks[0]), choice.ranks[0]
        for what, thin, options in (
            ("gradients formed", False, {}),
            ("no momentum", True, {"momentum": 0.0}),
            ("weight decay", True, {"weight_decay": 5e-4}),
        ):
            cheap[f"{name}, {what}"] = functional.low_rank(rank, thin, **options)
    if choice.adaptive:
        cheap[ADAPTIVE] = functional.kfac(lrkfac.adaptive_low_rank_kfac(functional.layers, rank=choice.ranks[0]))
    if choice.capture:
        cheap |= functional.captures()
    costly: dict[str, Method] = {}
    missing: dict[str, str] = {}
    if choice.dense and not choice.compiled:
        costly[DENSE] = functional.kfac(lrkfac.kfac(functional.layers, RATE, DAMPING))
        others, missing = steps_of_libraries(work)
        costly |= {name: Method(partial(step, False), None, partial(step, True)) for name, step in others.items()}
    return cheap, costly, missing


def measured(work: Work, choice: Choice, rates: Rates, device: torch.device) -> dict[str, Any]:
    """Seconds, floors and ratios to the SGD step: of plain and refresh steps, and their mean over a period."""
    torch.compiler.reset()  # each network has its own code
    cheap, costly, missing = methods(work, choice)
    floors = {name: _floors(method, rates) for name, method in (cheap | costly).items()}
    seconds, ratios, capture = {}, {}, None
    few = max(2, choice.repeats // COSTLY_REPEATS)
    for some, repeats, warmup in ((cheap, choice.repeats, 2), (costly, few, 1)):
        if some:
            found = interleaved(_functions(some | {SGD: cheap[SGD]}, choice.compiled), device, repeats, warmup)
            seconds = found | seconds
            ratios = median_ratios(found, SGD) | ratios
            if EMPIRICAL in found:
                capture = median_ratios(found, GRADIENT)[EMPIRICAL]
    sgd = statistics.median(seconds[SGD])
    rows = []
    for name, method in (cheap | costly).items():
        floor, again = floors[name]
        row = {"step": name, "seconds": statistics.median(seconds[name]), "ratio": ratios[name], "floor": floor}
        row["fastest ratio"] = min(seconds[name]) / min(seconds[SGD])
        if method.refresh is not None:
            of_refresh, mean_of = f"{name}, refresh", partial(_mean, every=choice.every)
            row |= {"refresh seconds": statistics.median(seconds[of_refresh]), "refresh ratio": ratios[of_refresh]}
            row |= {"refresh floor": again, "mean ratio": mean_of(ratios[name], ratios[of_refresh])}
            row["mean floor"] = None if floor is None or again is None else mean_of(floor, again)
        if choice.peaks:
            row["peak"] = peak_bytes(method.plain, device)
            row["refresh peak"] = None if method.refresh is None else peak_bytes(method.refresh, device)
        rows.append(row)
    return {"SGD seconds": sgd, "rows": rows, "missing": missing, "capture ratio": capture}


def _mean(plain: float, refresh: float, every: int) -> float:
    return ((every - 1) * plain + refresh) / every


def _floors(method: Method, rates: Rates) -> tuple[float | None, float | None]:
    """Seconds of a plain step and of a refresh, at least; ``None`` for what cannot be counted."""
    pairs = ((method.plain, method.reads), (method.refresh, method.refresh_reads))
    plain, refresh = (
        None if reads is None else cost(function, reads, method.again).floor(rates) for function, reads in pairs
    )
    return plain, refresh


def _functions(some: dict[str, Method], compiled: bool) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for name, method in some.items():
        found[name] = method.plain
        if method.refresh is not None:
            found[f"{name}, refresh"] = method.refresh
    return {name: torch.compile(f, fullgraph=True, dynamic=False) for name, f in found.items()} if compiled else found
