"""Problems, methods and the training loop of the examples that compare methods."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import optree
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import lrkfac

TRAINING_EXAMPLES = 1500
"""Number of the 1797 digits that are trained on, from the first."""

POINTS = 100
"""Number of points of a curve: evaluations of the whole training set, outside the clock."""


NOTHING_TO_CHOOSE = (1.0, (1.0,))
"""Learning rate and grid of a method without a learning rate."""


class Style(NamedTuple):
    """Label and line of a method."""

    label: str
    colour: str
    dashes: Any = "-"
    width: float = 1.6


class Metric(NamedTuple):
    """A measured number: its axis label with unit, its format, its axis.

    ``floor`` is a lower bound that the axis shows, ``None`` without one; ``ticks`` are the axis's.
    """

    name: str
    label: str
    form: str
    logarithmic: bool = False
    floor: float | None = None
    ticks: tuple[float, ...] = ()


class Options(NamedTuple):
    """Settings of a run that all methods share; ``refresh`` is the number of steps between statistics."""

    steps: int
    batch_size: int
    refresh: int


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        make: ``(layers, learning_rate) -> transformation``.
        learning_rates: The grid that ``--grid`` tries.
        learning_rate: The best of them, used by default.
        style: How its curve is drawn.
        curvature: Whether it needs statistics of the layers.
        problem: A problem for this method alone, such as fewer parameters for the same data.
    """

    make: Callable[[lrkfac.Layers, float], lrkfac.GradientTransformation]
    learning_rates: tuple[float, ...]
    learning_rate: float
    style: Style
    curvature: bool = False
    problem: Problem | None = None


@dataclass(frozen=True)
class Problem:
    """A model to train, as pure functions.

    Attributes:
        name: Names the files.
        title: Heads table and picture.
        model: ``model(params, inputs) -> outputs``.
        likelihood: Meaning of the outputs.
        init: ``seed -> params``.
        inputs: Training inputs, the batch axis first.
        targets: Training targets.
        measure: ``params -> `` the value of each metric.
        metrics: Measured numbers; the training loss is the first.
        examples: Name of the inputs, in the plural.
    """

    name: str
    title: str
    model: Callable[[Any, Tensor], Tensor]
    likelihood: lrkfac.Likelihood
    init: Callable[[int], Any]
    inputs: Tensor
    targets: Tensor
    measure: Callable[[Any], tuple[float, ...]]
    metrics: tuple[Metric, ...]
    examples: str = "digits"


class Point(NamedTuple):
    """One point of a curve; ``seconds`` counts the processor's time in training alone."""

    step: int
    seconds: float
    values: tuple[float, ...]


@dataclass
class Run:
    """One training run: its curve, the bytes that the optimizer's state takes, and the parameters at its end."""

    points: list[Point] = field(default_factory=list)
    state_bytes: int = 0
    params: Any = None

    @property
    def final_loss(self) -> float:
        """The last training loss; infinite where training diverged."""
        loss = self.points[-1].values[0]
        return loss if math.isfinite(loss) else math.inf


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 8 x 8 digits: pixels in [0, 1] ``[1797, 64]``, labels ``[1797]``."""
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def methods(learning_rates: Mapping[str, tuple[float, tuple[float, ...]]], **kfac: float) -> dict[str, Method]:
    """Return the seven methods.

    Args:
        learning_rates: For each name that has one the learning rate to use, and the grid it was chosen from.
        kfac: Settings of all K-FAC variants alike: ``damping``, ``decay``, ``kl_clip``.
    """

    def sgd(layers: lrkfac.Layers, learning_rate: float) -> lrkfac.GradientTransformation:
        return lrkfac.chain(lrkfac.trace(0.9), lrkfac.scale_by_learning_rate(learning_rate))

    def adam(layers: lrkfac.Layers, learning_rate: float) -> lrkfac.GradientTransformation:
        return lrkfac.chain(lrkfac.scale_by_adam(), lrkfac.scale_by_learning_rate(learning_rate))

    def dense(layers: lrkfac.Layers, learning_rate: float) -> lrkfac.GradientTransformation:
        return lrkfac.kfac(layers, learning_rate, **kfac)

    def low_rank(rank: int) -> Callable[[lrkfac.Layers, float], lrkfac.GradientTransformation]:
        return lambda layers, learning_rate: lrkfac.low_rank_kfac(layers, learning_rate, rank=rank, **kfac)

    def adaptive(layers: lrkfac.Layers, _: float) -> lrkfac.GradientTransformation:
        return lrkfac.adaptive_low_rank_kfac(layers, rank=16)

    # Okabe & Ito's colours; each line also differs by its dashes.
    first_order = {
        "sgd": (sgd, Style("SGD, momentum", "#666666", (0, (1, 1.2)))),
        "adam": (adam, Style("Adam", "#E69F00", (0, (5, 1.5, 1, 1.5)))),
    }
    second_order = {
        "kfac": (dense, Style("dense K-FAC", "#000000", (0, (5, 2)))),
        "rank-1": (low_rank(1), Style("low-rank K-FAC, rank 1", "#56B4E9")),
        "rank-4": (low_rank(4), Style("low-rank K-FAC, rank 4", "#009E73")),
        "rank-16": (low_rank(16), Style("low-rank K-FAC, rank 16", "#D55E00", width=2.2)),
        "adaptive": (adaptive, Style("adaptive, nothing tuned", "#CC79A7", width=2.2)),
    }
    table = {}
    for name, (make, style) in {**first_order, **second_order}.items():
        chosen, grid = learning_rates.get(name, NOTHING_TO_CHOOSE)
        table[name] = Method(make, grid, chosen, style, curvature=name in second_order)
    return table


def train(
    problem: Problem,
    method: Method,
    learning_rate: float,
    seed: int,
    options: Options,
    report: Callable[[Point], None],
) -> Run:
    """Train from the initial parameters of ``seed``; equal seeds give equal batches for every method."""
    problem = method.problem or problem
    params = problem.init(seed)
    layers = lrkfac.find_layers(problem.model, params, problem.inputs[:1])
    evaluate = lrkfac.evaluator(problem.model, problem.likelihood, layers)
    transformation = method.make(layers, learning_rate)
    state = transformation.init(params)
    batches, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    outputs_shape = problem.model(params, problem.inputs[: options.batch_size]).shape[1:]

    run, seconds, every = Run(), 0.0, max(1, options.steps // POINTS)
    for step in range(options.steps + 1):
        if step % every == 0 or step == options.steps:
            run.points.append(Point(step, seconds, problem.measure(params)))
            report(run.points[-1])
            if not math.isfinite(run.points[-1].values[0]):
                break
        if step == options.steps:
            break
        start = time.process_time()
        batch = torch.randint(len(problem.inputs), (options.batch_size,), generator=batches)
        refresh = method.curvature and step % options.refresh == 0
        uniform = torch.rand(1, options.batch_size, *outputs_shape, generator=noise) if refresh else None
        evaluation = evaluate(params, problem.inputs[batch], problem.targets[batch], refresh, noise=uniform)
        updates, state = transformation.update(evaluation.grads, state, params, evaluation=evaluation)
        params = lrkfac.apply_updates(params, updates)
        seconds += time.process_time() - start
    run.params = params
    run.state_bytes = sum(x.numel() * x.element_size() for x in optree.tree_leaves(state))
    return run
