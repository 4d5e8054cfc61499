"""A physics-informed network solves Poisson's equation, trained by three methods.

The network carries its derivatives forward: u, ∂u/∂x, ∂u/∂y and Δu are rows that go through the same weights together
(Dangel, Müller & Zeinhofer 2024, arXiv 2405.15603). So each weight is one linear layer with four rows for each point,
and K-FAC sees all of them.

python -m examples.physics_informed
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

import lrkfac
from examples.common import Metric, Options, Problem, methods
from examples.compare import compare

WIDTHS = (2, 32, 32, 32, 1)
POINTS = 2000  # of the square, from which batches are drawn
SIDE = 41  # points on each side of the grid on which the solution is compared

LEARNING_RATES = {
    "adam": (1e-2, (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)),
    "rank-16": (0.1, (0.01, 0.03, 0.1, 0.3, 1.0)),
}
DAMPING = 0.1  # of 1e-5, 1e-3, 0.1
KL_CLIP = 1e-2  # of 1e-2, 1e-1, 1
METHODS = ("adam", "rank-16", "adaptive")

Params = list[Tensor]


def init(seed: int) -> Params:
    """Weights ``[d_out, d_in + 1]`` by Glorot's rule, whose last column is the bias, zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = [
        math.sqrt(2 / (d_in + d_out)) * torch.randn(d_out, d_in + 1, generator=generator)
        for d_in, d_out in itertools.pairwise(WIDTHS)
    ]
    return [torch.cat([w[:, :-1], torch.zeros_like(w[:, -1:])], dim=1) for w in weights]


def taylor(params: Params, points: Tensor) -> Tensor:
    """``[N, 4, 1]``: value, ∂/∂x, ∂/∂y and Laplacian of the network at points ``[N, 2]``, by forward propagation.

    A linear layer is the same for all four rows, but for the bias: its input is the constant 1, whose derivatives are
    0. Through an activation ``t``, ``∂t(s) = t'(s) ∂s`` and ``Δt(s) = t'(s) Δs + t''(s) ‖∇s‖²``.
    """
    n = len(points)
    one = torch.eye(4, 1).expand(n, 4, 1)
    rows = torch.cat([points[:, None], torch.eye(2).expand(n, 2, 2), torch.zeros(n, 1, 2)], dim=1)
    for i, weight in enumerate(params):
        rows = torch.cat([rows, one], dim=2) @ weight.T
        if i < len(params) - 1:
            value, gradient, laplacian = rows.split([1, 2, 1], dim=1)
            t = torch.tanh(value)
            slope = 1 - t**2
            bend = -2 * t * slope * gradient.square().sum(dim=1, keepdim=True)
            rows = torch.cat([t, slope * gradient, slope * laplacian + bend], dim=1)
    return rows


def solution_and_laplacian(params: Params, points: Tensor) -> tuple[Tensor, Tensor]:
    """``u = b N`` and ``Δu`` ``[N, 1]``, with ``b = 16 x (1 - x) y (1 - y)``, so that u is zero on the border."""
    value, by_x, by_y, laplacian = taylor(params, points).unbind(dim=1)
    x, y = points.split(1, dim=1)
    p, q = 4 * x * (1 - x), 4 * y * (1 - y)
    p_x, q_y = 4 - 8 * x, 4 - 8 * y
    return p * q * value, -8 * (p + q) * value + 2 * (p_x * q * by_x + p * q_y * by_y) + p * q * laplacian


def residual(params: Params, points: Tensor) -> Tensor:
    """``-Δu``, to be equal to the right-hand side: ``[N, 1]``."""
    return -solution_and_laplacian(params, points)[1]


def exact(points: Tensor) -> Tensor:
    x, y = points.split(1, dim=1)
    return torch.sin(math.pi * x) * torch.sin(2 * math.pi * y)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    points = torch.rand(POINTS, 2, generator=torch.Generator().manual_seed(0))
    right_hand_side = 5 * math.pi**2 * exact(points)
    line = torch.linspace(0, 1, SIDE)
    grid = torch.cartesian_prod(line, line)
    likelihood = lrkfac.gaussian()

    def measure(params: Params) -> tuple[float, float]:
        loss = likelihood.negative_log_likelihood(residual(params, points), right_hand_side).mean()
        error = (solution_and_laplacian(params, grid)[0] - exact(grid)).norm() / exact(grid).norm()
        return loss.item(), error.item()

    everything = methods(LEARNING_RATES, damping=DAMPING, kl_clip=KL_CLIP)
    chosen = {name: everything[name] for name in METHODS}
    result = compare(
        Problem(
            name="physics_informed",
            title=f"-Δu = f on the unit square, network {'-'.join(map(str, WIDTHS))}, tanh",
            model=residual,
            likelihood=likelihood,
            init=init,
            inputs=points,
            targets=right_hand_side,
            measure=measure,
            metrics=(
                Metric("loss [nats]", "half the squared residual", "{:.1e}", logarithmic=True),
                Metric("relative error", "relative error of u", "{:.1e}", logarithmic=True),
            ),
            examples="points",
        ),
        chosen,
        (__doc__ or "").splitlines()[0],
        Options(steps=500, batch_size=256, refresh=5),
        arguments,
    )
    picture = result.folder / "physics_informed_solutions.png"
    solutions = {chosen[n].style.label: solution_and_laplacian(r[0].params, grid)[0] for n, r in result.runs.items()}
    _draw(picture, exact(grid), solutions)
    result.console.print(f"wrote {picture}", highlight=False, soft_wrap=True)


def _draw(path: Path, expected: Tensor, solutions: dict[str, Tensor]) -> None:
    """Draw the solution, and each method's error on a separate scale."""
    with matplotlib.rc_context({"font.size": 10, "axes.titlesize": 10}):
        figure = Figure(figsize=(2.9 * (1 + len(solutions)), 3.6), dpi=150, layout="constrained")
        axes = figure.subplots(1, 1 + len(solutions), sharex=True, sharey=True)
        for axis, (title, field) in zip(axes, {"solution u": expected, **solutions}.items(), strict=True):
            shown = (field if field is expected else field - expected).reshape(SIDE, SIDE).T
            limit = shown.abs().max().item()
            image = axis.imshow(
                shown.numpy(), origin="lower", extent=(0, 1, 0, 1), cmap="RdBu_r", vmin=-limit, vmax=limit
            )
            axis.set_title(title if field is expected else f"error, {title}", loc="left")
            figure.colorbar(
                image, ax=axis, orientation="horizontal", ticks=[-0.9 * limit, 0, 0.9 * limit], format="%.1g"
            )
        figure.savefig(path)


if __name__ == "__main__":
    main()
