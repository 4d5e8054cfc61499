"""Networks that solve differential equations, with Adam, low-rank K-FAC, and exact steps in sample space.

By ``lrkfac.derivatives``, u, its gradient and its second derivatives are rows that go through the same weights together
(Dangel, Müller & Zeinhofer 2024, arXiv 2405.15603). So each weight is one linear layer with a row for each derivative
at each point, and K-FAC and the kernel of the sample space see all of them.

python -m examples.physics_informed
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lrkfac

SIDE = 41  # points on each side of the plane on which solutions are compared
STEP_SIZES = tuple(2.0**-k for k in range(13))  # of the line search
RATE = 1e-2  # Adam's, of 1e-3, 3e-3, 1e-2; it falls to 0 as a cosine
DAMPING = 1e-8  # of the sample space

Params = list[Tensor]


def network(params: Params, points: Tensor) -> Tensor:
    """``u`` at points ``[N, d]``, ``[N, 1]``, from weights and biases in turn: any pure function will do."""
    x = F.linear(points, params[0], params[1])
    for weight, bias in zip(params[2::2], params[3::2], strict=True):
        x = F.linear(torch.tanh(x), weight, bias)
    return x


def initial(widths: Sequence[int], seed: int) -> Params:
    """Weights by Glorot's rule and biases on [-1, 1], in float64."""
    generator, params = torch.Generator().manual_seed(seed), []
    for d_in, d_out in itertools.pairwise(widths):
        weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
        bias = 2 * torch.rand(d_out, generator=generator, dtype=torch.float64) - 1
        params += [math.sqrt(2 / (d_in + d_out)) * weight, bias]
    return params


@dataclass(frozen=True)
class Equation:
    """A linear differential equation on the unit cube, by a solution that is known.

    Attributes:
        title: What is solved.
        widths: Of the network; the first is the number of coordinates.
        curved: Coordinates whose second derivatives count.
        left: The left-hand side from the gradient ``[N, d]`` and the sum of these second derivatives, ``[N, 1]``.
        right: The right-hand side at points ``[N, d]``.
        solution: ``u`` at points.
        inside: Number of points inside.
        outside: Number of points on the border.
        faces: Number of the border's sides where values are given, from the first: ``x₀ = 0``, ``x₀ = 1``, and so on.
    """

    title: str
    widths: tuple[int, ...]
    curved: tuple[int, ...]
    left: Callable[[Tensor, Tensor], Tensor]
    right: Callable[[Tensor], Tensor]
    solution: Callable[[Tensor], Tensor]
    inside: int
    outside: int
    faces: int

    def model(self, params: Params, inputs: Tensor) -> Tensor:
        """``[N, 1]`` at points with their weights inside and on the border: the left-hand side, or u on the border."""
        points, inner, outer = inputs.split([self.widths[0], 1, 1], dim=1)
        u = lrkfac.derivatives(network, second=[[(i, i) for i in self.curved]])(params, points)
        return inner * self.left(u.gradient[:, 0], u.second[:, 0]) + outer * u.value

    def data(self, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets; weights make the loss the sum of two means, one inside and one on the border."""
        generator, d = torch.Generator().manual_seed(seed), self.widths[0]
        points = torch.rand(self.inside, d, generator=generator, dtype=torch.float64)
        points = torch.cat([points, border(self.outside, generator, d, self.faces)])
        number = self.inside + self.outside
        inner = (torch.arange(number) < self.inside).double()[:, None]
        weights = inner * math.sqrt(number / self.inside), (1 - inner) * math.sqrt(number / self.outside)
        targets = weights[0] * self.right(points) + weights[1] * self.solution(points)
        return torch.cat([points, *weights], dim=1), targets


def product_of_sines(points: Tensor) -> Tensor:
    return torch.sin(math.pi * points).prod(dim=1, keepdim=True)


def heat(points: Tensor) -> Tensor:
    x, t = points.split(1, dim=1)
    return torch.exp(-(math.pi**2) * t / 4) * torch.sin(math.pi * x)


def sum_of_cosines(points: Tensor) -> Tensor:
    return torch.cos(math.pi * points).sum(dim=1, keepdim=True)


EQUATIONS = {
    "poisson": Equation(
        "-Δu = f on the unit square",
        (2, 64, 1),
        (0, 1),
        lambda gradient, second: -second,
        lambda points: 2 * math.pi**2 * product_of_sines(points),
        product_of_sines,
        400,
        120,
        4,
    ),
    "heat": Equation(
        "∂u/∂t = ¼ ∂²u/∂x², from a sine",
        (2, 64, 1),
        (0,),
        lambda gradient, second: gradient[:, 1:] - second / 4,
        lambda points: 0 * points[:, :1],
        heat,
        400,
        120,
        3,
    ),
    "poisson-5d": Equation(
        "-Δu = f in five dimensions",
        (5, 48, 48, 1),
        (0, 1, 2, 3, 4),
        lambda gradient, second: -second,
        lambda points: math.pi**2 * sum_of_cosines(points),
        sum_of_cosines,
        500,
        200,
        10,
    ),
}


def border(number: int, generator: torch.Generator, d: int = 2, faces: int | None = None) -> Tensor:
    """Points ``[number, d]`` on the first ``faces`` sides of the unit cube, in turn; by default on all."""
    points = torch.rand(number, d, generator=generator, dtype=torch.float64)
    face = torch.arange(number) % (faces or 2 * d)
    points[torch.arange(number), face // 2] = ((face + face // 2) % 2).double()
    return points


def adam(equation: Equation, params: Params, left: Callable[[], float]) -> Iterator[Params]:
    """Steps of Adam, whose rate falls with the share of time that is left."""
    inputs, targets = equation.data(0)
    leaves = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.Adam(leaves)
    while True:
        yield [p.detach() for p in leaves]
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 - math.cos(math.pi * left()))
        optimizer.zero_grad()
        (0.5 * (equation.model(leaves, inputs) - targets).square().mean()).backward()
        optimizer.step()


def low_rank(equation: Equation, params: Params, left: Callable[[], float]) -> Iterator[Params]:
    """Steps of the adaptive chain, which has no rate to choose."""
    inputs, targets = equation.data(0)
    layers = lrkfac.find_layers(equation.model, params, inputs)
    evaluate = lrkfac.evaluator(equation.model, lrkfac.gaussian(), layers)
    tx = lrkfac.adaptive_low_rank_kfac(layers, rank=16)
    state = tx.init(params)
    for i in itertools.count():
        yield params
        evaluation = evaluate(params, inputs, targets, statistics=i % 5 == 0)
        updates, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        params = lrkfac.apply_updates(params, updates)


def sample_space(equation: Equation, params: Params, left: Callable[[], float]) -> Iterator[Params]:
    """Steps along the exact Gauss-Newton direction, as long as the loss says among halvings of 1."""
    inputs, targets = equation.data(0)
    layers = lrkfac.find_layers(equation.model, params, inputs)
    evaluate = lrkfac.evaluator(equation.model, lrkfac.gaussian(), layers, "exact")
    tx = lrkfac.precondition_in_sample_space(layers, DAMPING)
    state = tx.init(params)
    while True:
        yield params
        evaluation = evaluate(params, inputs, targets)
        natural, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        tried = [[p - size * u for p, u in zip(params, natural, strict=True)] for size in STEP_SIZES]
        losses = torch.stack([evaluation.loss_at(one) for one in tried])
        params = tried[int(losses.nan_to_num(nan=math.inf).argmin())]


METHODS = {"Adam": adam, "low-rank K-FAC": low_rank, "sample space": sample_space}


def plane(equation: Equation) -> Tensor:
    """Points of the plane of the first two coordinates, the others being ¼."""
    line = torch.linspace(0, 1, SIDE, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    return torch.cat([points, points.new_full((len(points), equation.widths[0] - 2), 0.25)], dim=1)


def trained(equation: Equation, method: str, seconds: float, steps: int, seed: int) -> tuple[Params, int, float]:
    """Parameters after so many CPU seconds or steps, whichever are over first, and how many steps and seconds."""
    start, done = time.process_time(), 0

    def left() -> float:
        return max(1 - max((time.process_time() - start) / seconds, done / steps), 0.0)

    for params in METHODS[method](equation, initial(equation.widths, seed), left):
        if left() == 0:
            return params, done, time.process_time() - start
        done += 1
    raise AssertionError("methods never end")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.physics_informed", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--equations", nargs="+", default=list(EQUATIONS), choices=list(EQUATIONS), help="equations to solve")
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="methods to compare")
    add("--seconds", type=float, default=10.0, help="CPU seconds of each run")
    add("--steps", type=int, default=10**9, help="maximum number of steps of each run")
    add("--seed", type=int, default=0, help="seed of the initial parameters")
    add("--output", type=Path, default=Path(), help="folder for the picture")
    options = parser.parse_args(arguments)
    console = Console()
    table = Table("equation", "method", "steps", "CPU seconds", "relative error of u", box=SIMPLE)
    pictures = {}
    for name in options.equations:
        equation = EQUATIONS[name]
        points = plane(equation)
        expected = equation.solution(points)
        shown = {f"u, {name}": expected}
        for method in options.methods:
            params, steps, seconds = trained(equation, method, options.seconds, options.steps, options.seed)
            error = network(params, points) - expected
            table.add_row(name, method, str(steps), f"{seconds:.1f}", f"{(error.norm() / expected.norm()).item():.1e}")
            shown[f"error, {method}"] = error
        pictures[name] = shown
    console.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "physics_informed.png"
    draw(path, list(pictures.values()))
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def draw(path: Path, pictures: Sequence[dict[str, Tensor]]) -> None:
    """Draw solutions and errors, each on a separate scale: a row for each equation."""
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9}):
        columns = max(map(len, pictures))
        figure = Figure(figsize=(2.7 * columns, 3.1 * len(pictures)), dpi=110, layout="constrained")
        axes = figure.subplots(len(pictures), columns, squeeze=False, sharex=True, sharey=True)
        for row, shown in zip(axes, pictures, strict=True):
            for axis, (title, field) in zip(row, shown.items(), strict=True):
                limit = field.abs().max().item()
                image = axis.imshow(
                    field.reshape(SIDE, SIDE).T.numpy(),
                    origin="lower",
                    extent=(0, 1, 0, 1),
                    cmap="RdBu_r",
                    vmin=-limit,
                    vmax=limit,
                )
                axis.set_title(title, loc="left")
                ticks = [-0.9 * limit, 0, 0.9 * limit]
                figure.colorbar(image, ax=axis, orientation="horizontal", ticks=ticks, format="%.1g")
        figure.savefig(path)


if __name__ == "__main__":
    main()
