"""Physics-informed networks: the sample space beside Adam and L-BFGS, by CPU time of one thread.

Poisson's equation on the unit square, -Δu = 2π² sin(πx) sin(πy) with u = 0 on the border, as in Dangel, Müller &
Zeinhofer 2024 (arXiv 2405.15603): the mean squared residual at points inside and that of u at points on the border.
All methods see the same points in float64. The error is that of u on a grid of 101 × 101 points, relative in L2.

python -m benchmarks.physics --networks 2-64-1 --methods flow --seconds 60
python -m benchmarks.physics --report
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

import lrkfac
from benchmarks.common import (
    COLOURS,
    argument_parser,
    command_of,
    environment,
    results_table,
    wide_console,
    write_json,
    write_results,
)
from examples.physics_informed import border

NETWORKS = ("2-64-1", "2-64-64-48-48-1")
STEP_SIZES = tuple(2.0**-k for k in range(13))
LEAST = 1e-18  # damping; the kernel's rounding bounds it as well
SHOWN = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
SIDE = 101
METHODS = ("flow", "line-search", "lbfgs", "adam")
Params = list[Tensor]


def initial(widths: Sequence[int], seed: int) -> Params:
    """Weights ``[d_out, d_in + 1]`` by Glorot's rule in float64; the last column is the bias, uniform on [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for d_in, d_out in itertools.pairwise(widths):
        weight = math.sqrt(2 / (d_in + d_out)) * torch.randn(d_out, d_in + 1, generator=generator, dtype=torch.float64)
        weight[:, -1] = 2 * torch.rand(d_out, generator=generator, dtype=torch.float64) - 1
        weights.append(weight)
    weights[-1][:, -1] = 0
    return weights


def taylor(params: Params, points: Tensor) -> Tensor:
    """``[N, d + 2, 1]``: value, gradient and Laplacian of the network at points ``[N, d]``, carried forward by hand.

    A linear layer is the same for all rows, but for the bias: its input is the constant 1, whose derivatives are 0.
    Through an activation ``t``, ``∂t(s) = t'(s) ∂s`` and ``Δt(s) = t'(s) Δs + t''(s) ‖∇s‖²``. ``lrkfac.laplacian``
    does the same for any network.
    """
    n, d = points.shape
    like = points.new_ones(())
    one = torch.eye(d + 2, 1).to(like).expand(n, d + 2, 1)
    derivatives = torch.eye(d).to(like).expand(n, d, d)
    rows = torch.cat([points[:, None], derivatives, points.new_zeros(n, 1, d)], dim=1)
    for i, weight in enumerate(params):
        rows = torch.cat([rows, one], dim=2) @ weight.T
        if i < len(params) - 1:
            value, gradient, second = rows.split([1, d, 1], dim=1)
            t = torch.tanh(value)
            slope = 1 - t**2
            bend = -2 * t * slope * gradient.square().sum(dim=1, keepdim=True)
            rows = torch.cat([t, slope * gradient, slope * second + bend], dim=1)
    return rows


def model(params: Params, inputs: Tensor) -> Tensor:
    """Residuals ``[N, 1]`` at ``(x, y, weight inside, weight on the border)``: -Δu inside, u on the border."""
    rows = taylor(params, inputs[:, :2])
    return inputs[:, 2:3] * -rows[:, 3] + inputs[:, 3:] * rows[:, 0]


def exact(points: Tensor) -> Tensor:
    return torch.sin(math.pi * points).prod(dim=1, keepdim=True)


def problem(inside: int, outside: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets; weights make the loss the sum of two means, ``½ mean(r²) + ½ mean(u²)``."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(inside, 2, generator=generator, dtype=torch.float64)
    number = inside + outside
    weights = [math.sqrt(number / inside), math.sqrt(number / outside)]
    of_points = torch.tensor([weights[0], 0.0], dtype=torch.float64).expand(inside, 2)
    of_border = torch.tensor([0.0, weights[1]], dtype=torch.float64).expand(outside, 2)
    inputs = torch.cat(
        [torch.cat([points, of_points], dim=1), torch.cat([border(outside, generator), of_border], dim=1)]
    )
    return inputs, inputs[:, 2:3] * 2 * math.pi**2 * exact(inputs[:, :2])


def by_line_search(inputs: Tensor, targets: Tensor, params: Params, damping: float) -> Iterator[tuple[Params, float]]:
    """Steps along the exact Gauss-Newton direction, each of the length among halvings of 1 with the least loss."""
    layers = lrkfac.find_layers(model, params, inputs)
    evaluate = lrkfac.evaluator(model, lrkfac.gaussian(), layers, "exact")
    tx = lrkfac.precondition_in_sample_space(layers, damping)
    state = tx.init(params)
    while True:
        evaluation = evaluate(params, inputs, targets)
        yield params, evaluation.loss.item()
        natural, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        tried = [[p - size * u for p, u in zip(params, natural, strict=True)] for size in STEP_SIZES]
        losses = torch.stack([evaluation.loss_at(one) for one in tried])
        params = tried[int(losses.nan_to_num(nan=math.inf).argmin())]


def by_flow(inputs: Tensor, targets: Tensor, params: Params, damping: float) -> Iterator[tuple[Params, float]]:
    """Steps along the Gauss-Newton flow ``dθ/dt = -(F + λ I)⁻¹ ∇`` by the method of Runge and Kutta, of order 4.

    A step is taken where the loss falls by a fifth at least of what the model of the batch promises, and the next is
    longer or shorter by the same number. ``λ`` halves with each step of half a unit of time or more.
    """
    layers = lrkfac.find_layers(model, params, inputs)
    evaluate = lrkfac.evaluator(model, lrkfac.gaussian(), layers, "exact")
    tx = lrkfac.precondition_in_sample_space(layers, damping)
    state, size = tx.init(params), 0.25

    def direction(params: Params) -> tuple[lrkfac.Evaluation, Params]:
        evaluation = evaluate(params, inputs, targets)
        extra = {"evaluation": evaluation, "factor_damping": damping}
        return evaluation, tx.update(evaluation.grads, state, params, **extra)[0]

    def moved(size: float, along: Params) -> Params:
        return [p - size * u for p, u in zip(params, along, strict=True)]

    evaluation, first = direction(params)
    while True:
        yield params, evaluation.loss.item()
        second = direction(moved(size / 2, first))[1]
        third = direction(moved(size / 2, second))[1]
        last = direction(moved(size, third))[1]
        stages = zip(first, second, third, last, strict=True)
        tried = moved(size, [(a + 2 * b + 2 * c + d) / 6 for a, b, c, d in stages])
        slope = torch.stack([(g * u).sum() for g, u in zip(evaluation.grads, first, strict=True)]).sum()
        ratio = float((evaluation.loss - evaluation.loss_at(tried)) / (slope * (size - size**2 / 2)))
        if not ratio > 0.2:  # also where it is not a number
            size /= 3
            continue
        params = tried
        size = min(1.7 * size, 1.0) if ratio > 0.8 else 0.7 * size if ratio < 0.5 else size
        if ratio > 0.8 and size >= 0.5:
            damping = max(damping / 2, LEAST)
        evaluation, first = direction(params)


def by_optimizer(
    inputs: Tensor, targets: Tensor, params: Params, make: Callable[[Params], torch.optim.Optimizer], share: Any = None
) -> Iterator[tuple[Params, float]]:
    """Steps of an optimizer of torch; its rate is multiplied with ``share()``, the part of the time that is left."""
    leaves = [p.clone().requires_grad_() for p in params]
    optimizer = make(leaves)
    rate = optimizer.param_groups[0]["lr"]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (model(leaves, inputs) - targets).square().mean()
        loss.backward()
        return loss

    while True:
        if share is not None:
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * (1 - share())))
        loss = float(optimizer.step(closure).detach())  # type: ignore[arg-type]
        yield [p.detach() for p in leaves], loss


def run(name: str, method: str, rate: float, options: Any) -> Iterator[dict[str, Any]]:
    """Trains one network, and yields errors and losses by CPU seconds of this process, without those of measuring."""
    inputs, targets = problem(options.points, options.border, options.seed)
    params = initial([int(width) for width in name.split("-")], options.seed)
    line = torch.linspace(0, 1, SIDE, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    expected = exact(grid)
    spent, start = 0.0, time.process_time()

    def elapsed() -> float:
        return time.process_time() - start - spent

    def share() -> float:
        return max(1 - elapsed() / options.seconds, 0.0)

    if method in ("flow", "line-search"):
        steps = (by_flow if method == "flow" else by_line_search)(inputs, targets, params, rate)
    elif method == "adam":
        steps = by_optimizer(inputs, targets, params, lambda p: torch.optim.Adam(p, rate), share)
    else:
        search = {"line_search_fn": "strong_wolfe", "tolerance_grad": 0, "tolerance_change": 0}
        steps = by_optimizer(inputs, targets, params, lambda p: torch.optim.LBFGS(p, rate, history_size=100, **search))
    curve: dict[str, list[float]] = {"seconds": [], "steps": [], "loss": [], "error": []}
    due = 0.5
    for number, (params, loss) in enumerate(steps):
        now = elapsed()
        if now < due and now < options.seconds:
            continue
        before = time.process_time()
        error = ((taylor(params, grid)[:, 0] - expected).norm() / expected.norm()).item()
        for values, value in zip(curve.values(), (now, number, loss, error), strict=True):
            values.append(value)
        due = 1.15 * now
        yield {"network": name, "method": method, "rate": rate, "seed": options.seed, **curve}
        spent += time.process_time() - before
        if now >= options.seconds or not math.isfinite(loss):
            break


def key(one: dict[str, Any]) -> tuple[Any, ...]:
    return one["network"], one["method"], one["rate"], one["seed"]


def best(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each network and method the run with the least error at its end."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for one in runs:
        pair = one["network"], one["method"]
        if pair not in found or one["error"][-1] < found[pair]["error"][-1]:
            found[pair] = one
    order = [(network, method) for network in NETWORKS for method in METHODS]
    return [found[pair] for pair in order if pair in found]


def report(path: Any, content: dict[str, Any]) -> None:
    """Prints the table of the best runs, and draws them."""
    console = wide_console()
    rows = []
    for one in best(content["runs"]):
        pairs = list(zip(one["error"], one["seconds"], strict=True))
        reached = [next((f"{s:.0f}" for error, s in pairs if error <= bound), "") for bound in SHOWN]
        setting = f"{one['method']} {one['rate']:g}"
        rows.append((one["network"], setting, f"{one['seconds'][-1]:.0f}", f"{one['error'][-1]:.1e}", *reached))
    headings = ("network", "method", "CPU seconds", "relative error", *[f"s to {bound:.0e}" for bound in SHOWN])
    console.print(results_table("-Δu = f on the unit square, float64, one thread", headings, rows))
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
        axes = figure.subplots(1, len(NETWORKS), sharey=True)
        for axis, network in zip(axes, NETWORKS, strict=True):
            for colour, method in zip(COLOURS, METHODS, strict=False):
                for one in best(content["runs"]):
                    if (one["network"], one["method"]) == (network, method):
                        axis.loglog(one["seconds"], one["error"], color=colour, label=method)
            axis.set_title(network, loc="left")
            axis.set_xlabel("CPU seconds")
        axes[0].set_ylabel("relative L2 error of u")
        axes[0].legend(frameon=False)
    write_results(path, content, figure, console)


RATES = {"flow": (1e-10,), "line-search": (1e-10,), "adam": (3e-3,), "lbfgs": (1.0,)}
"""The damping of both methods in the space of samples, and the learning rates of the others."""


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser("benchmarks.physics", __doc__)
    add = parser.add_argument
    add("--networks", nargs="+", default=list(NETWORKS), help="widths of all layers")
    add("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    add("--rates", nargs="+", type=float, help="in place of each method's own: dampings or learning rates")
    add("--seconds", type=float, default=1000.0, help="CPU seconds of each run")
    add("--points", type=int, default=400, help="inside")
    add("--border", type=int, default=120, help="points on the border")
    add("--seed", type=int, default=0)
    add("--report", action="store_true", help="table and picture of what there is")
    options = parser.parse_args()
    measured = environment(options.threads, torch.device("cpu"))
    path = options.output / "physics_cpu.json"
    if not options.report:
        for network in options.networks:
            for method in options.methods:
                for rate in options.rates or RATES[method]:
                    about = {**measured, **command_of("benchmarks.physics", vars(options))}
                    for one in run(network, method, rate, options):
                        content = json.loads(path.read_text()) if path.exists() else {"runs": []}
                        others = [x for x in content["runs"] if x["environment"] != about or key(x) != key(one)]
                        write_json(path, {"runs": [*others, {**one, "environment": about}]})
    report(path, json.loads(path.read_text()))


if __name__ == "__main__":
    main()
