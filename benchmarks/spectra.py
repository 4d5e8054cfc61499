"""Systems with a Gauss-Newton matrix by preconditioned conjugate gradients, and the spectrum of a ResNet-18's.

python -m benchmarks.spectra
python -m benchmarks.spectra --only spectrum

The first solves ``(G + damping I) x = gradient`` on the digits autoencoder after some steps of training, in float64,
plainly and with the rank-r K-FAC inverse of the same examples as preconditioner. The second does so with fewer digits
and the exact blocks of layers, the limit of K-FAC. The third takes the density of the eigenvalues of the Gauss-Newton
matrix of a ResNet-18 on random images by stochastic Lanczos quadrature.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optree
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

import lrkfac
from benchmarks.common import (
    COLOURS,
    argument_parser,
    command_of,
    environment,
    results_table,
    wide_console,
    write_results,
)
from benchmarks.networks import resnet18
from benchmarks.problems import PROBLEMS
from lrkfac.core.curvature.sample_space import OutputJacobian
from lrkfac.structures import kronecker, low_rank, low_rank_plus_diagonal

MODULE = "benchmarks.spectra"
TOLERANCES = [10.0**-k for k in range(1, 7)]
PARTS = ("systems", "blocks", "spectrum")


def trained(steps: int, rank: int) -> tuple[Any, Any, Any]:
    """The digits autoencoder in float64 after some steps of the adaptive chain, its problem and layers."""
    problem = PROBLEMS["digits_autoencoder"](None, "tanh")
    params = optree.tree_map(Tensor.double, problem.init(0))
    inputs, targets = problem.inputs.double(), problem.targets.double()
    layers = lrkfac.find_layers(problem.model, params, inputs[:2])
    evaluate = lrkfac.evaluator(problem.model, problem.likelihood, layers)
    tx = lrkfac.adaptive_low_rank_kfac(layers, rank=rank)
    state, batches = tx.init(params), problem.batches(256, 0)
    torch.manual_seed(0)
    for step in range(steps):
        batch = next(batches)
        evaluation = evaluate(params, inputs[batch], targets[batch], statistics=step % 5 == 0)
        updates, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        params = lrkfac.apply_updates(params, updates)
    return problem, params, layers


def solved(
    matrix: Any, b: Any, inverse: Callable[[Any], Any], damping: float, most: int
) -> tuple[list[float], float, int]:
    """Relative residuals by the number of products, seconds of the processor, and the number of products."""
    lengths: list[float] = []

    def watched(residual: Any) -> Any:
        lengths.append(sum(float(x.square().sum()) for x in optree.tree_leaves(residual)) ** 0.5)
        return inverse(residual)

    start = time.process_time()
    found = lrkfac.linalg.conjugate_gradient(matrix, b, watched, damping, TOLERANCES[-1], most)
    return [x / lengths[0] for x in lengths], time.process_time() - start, int(found.products)


def problem_of(arguments: Any, examples: int) -> tuple[Any, Any, Any, Any, Any]:
    """The Gauss-Newton matrix of some digits, the gradient, and what estimates of the former are made of."""
    problem, params, layers = trained(arguments.steps, arguments.rank)
    inputs, targets = (x[:examples].double() for x in (problem.inputs, problem.targets))
    evaluate = lrkfac.evaluator(problem.model, problem.likelihood, layers, estimator="exact")
    matrix = lrkfac.curvature.ggn(problem.model, problem.likelihood)(params, [(inputs, targets)])
    structure = kronecker(low_rank(arguments.rank), low_rank_plus_diagonal(arguments.rank), exact_damping=True)
    fisher = lrkfac.curvature.estimate(evaluate, params, [(inputs, targets)] * 4, layers, structure)
    return matrix, evaluate(params, inputs, targets), fisher, layers, params


def rows_of(arguments: Any, matrix: Any, b: Any, inverses: dict[str, Callable[[Any], Any]]) -> list[dict[str, Any]]:
    """Products to each tolerance, plainly and preconditioned."""
    rows: list[dict[str, Any]] = []
    for name, inverse in {"none": lambda x: x, **inverses}.items():
        most = arguments.most if not rows else rows[0]["products"]
        residuals, seconds, products = solved(matrix, b, inverse, arguments.damping, most)
        reached = [next((i for i, x in enumerate(residuals) if x <= one), None) for one in TOLERANCES]
        rows.append({"preconditioner": name, "products": products, "reached": reached, "seconds": seconds})
        print(name, products, reached, f"{seconds:.0f} s", flush=True)
    return rows


def systems(arguments: Any) -> list[dict[str, Any]]:
    """With the rank-r K-FAC inverse as preconditioner."""
    matrix, evaluation, fisher, _, _ = problem_of(arguments, arguments.examples)
    inverses = {
        f"rank {arguments.rank}, damping {damping:g}": fisher.inverse(damping, exact=True).product
        for damping in arguments.dampings
    }
    return rows_of(arguments, matrix, evaluation.grads, inverses)


def exact_blocks(layers: Any, evaluation: Any, params: Any, damping: float) -> Callable[[Any], Any]:
    """The inverse of the exact diagonal blocks of layers, ``(s Jᵀ J + λ I)⁻¹`` of each: what K-FAC approximates."""
    jacobian = OutputJacobian.of(layers, evaluation.statistics, torch.float64)
    scale, spec = evaluation.statistics.scale, optree.tree_structure(params)
    blocks: list[tuple[list[int], Tensor, Tensor]] = []
    for layer in layers:
        one = replace(jacobian, layers=replace(layers, layers=(layer,)))
        outputs = one.along(optree.tree_leaves(params)).numel()
        rows = torch.func.vmap(one.transposed)(torch.eye(outputs, dtype=torch.float64))
        matrix = torch.cat([x.reshape(outputs, -1) for x in rows.values()], dim=1)
        kernel = matrix @ matrix.T
        kernel.diagonal().add_(damping / scale)
        blocks.append((list(rows), matrix, torch.linalg.inv(kernel)))

    def product(tree: Any) -> Any:
        leaves = optree.tree_leaves(tree)
        found = [x / damping for x in leaves]
        for indices, matrix, inverse in blocks:
            along = matrix @ torch.cat([leaves[i].reshape(-1) for i in indices])
            parts = ((inverse @ along) @ matrix / damping).split([leaves[i].numel() for i in indices])
            for i, part in zip(indices, parts, strict=True):
                found[i] = found[i] - part.reshape(leaves[i].shape)
        return optree.tree_unflatten(spec, found)

    return product


def blocks(arguments: Any) -> list[dict[str, Any]]:
    """With exact blocks of layers, the limit of every preconditioner of blocks, for so few digits that they fit."""
    matrix, evaluation, fisher, layers, params = problem_of(arguments, arguments.few)
    inverses: dict[str, Callable[[Any], Any]] = {}
    for damping in (arguments.damping, 10 * arguments.damping, 100 * arguments.damping):
        inverses[f"exact blocks, damping {damping:g}"] = exact_blocks(layers, evaluation, params, damping)
    inverses[f"rank {arguments.rank}, damping {100 * arguments.damping:g}"] = fisher.inverse(
        100 * arguments.damping, exact=True
    ).product
    return rows_of(arguments, matrix, evaluation.grads, inverses)


def spectrum(arguments: Any) -> dict[str, Any]:
    """Density of the eigenvalues, and the time that it took."""
    work = resnet18(arguments.images, torch.device("cpu"))
    model, params = lrkfac.from_module(work.module.eval())
    start, processor = time.perf_counter(), time.process_time()
    matrix = lrkfac.curvature.ggn(model, lrkfac.categorical())(params, [(work.inputs, work.targets)])
    generator = torch.Generator().manual_seed(0)
    found = lrkfac.curvature.spectral_density(matrix, arguments.samples, arguments.lanczos, generator)
    return {
        "parameters": int(found.dimension),
        "images": arguments.images,
        "products": arguments.samples * arguments.lanczos,
        "seconds": time.perf_counter() - start,
        "processor seconds": time.process_time() - processor,
        "trace": float(found.moment(1) * found.dimension),
        "largest": float(found.nodes.amax()),
        "nodes": found.nodes.tolist(),
        "weights": found.weights.tolist(),
    }


def draw(content: dict[str, Any]) -> Figure:
    """Residuals by products; eigenvalues in a decade."""
    figure = Figure(figsize=(10, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for row, colour in zip(content.get("systems", []), COLOURS, strict=False):
        points = [(0, 1.0), *((n, x) for n, x in zip(row["reached"], TOLERANCES, strict=True) if n is not None)]
        left.plot(*zip(*points, strict=True), color=colour, lw=1.3, marker=".", label=row["preconditioner"])
    left.set(yscale="log", xlabel="products with the Gauss-Newton matrix", ylabel="relative residual")
    left.set_title("digits autoencoder, by preconditioner", fontsize=9)
    if content.get("systems"):
        left.legend(frameon=False, fontsize=8)
    found = content.get("spectrum")
    if found:
        nodes, weights = torch.tensor(found["nodes"]).double(), torch.tensor(found["weights"]).double()
        weights = weights * found["parameters"] / len(weights)
        shown = nodes > 1e-7 * nodes.amax()
        points = torch.linspace(
            float(nodes[shown].log10().amin()) - 0.5, float(nodes.amax().log10()) + 0.5, 500
        ).double()
        bumps = torch.exp(-(((points[:, None] - nodes[shown].log10()) / 0.1) ** 2) / 2) / (0.1 * 2.5066)
        right.plot((10**points).tolist(), (bumps @ weights[shown]).tolist(), color=COLOURS[4], lw=1.3)
        right.set_ylim(bottom=0.3)
        right.set_title(f"ResNet-18, {found['parameters']:,} eigenvalues", fontsize=9)
    right.set(xscale="log", yscale="log", xlabel="eigenvalue", ylabel="eigenvalues in a decade")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#DDDDDD", linewidth=0.6)
    return figure


def show(content: dict[str, Any], console: Console) -> None:
    """Prints the tables."""
    headings = ["preconditioner", *[f"{x:.0e}" for x in TOLERANCES], "CPU s"]
    for part, title in (("systems", "Products to a relative residual"), ("blocks", "The same, of few digits")):
        rows = [
            [row["preconditioner"], *["–" if n is None else str(n) for n in row["reached"]], f"{row['seconds']:.0f}"]
            for row in content.get(part, [])
        ]
        if rows:
            console.print(results_table(title, headings, rows))
    if "spectrum" in content:
        found = content["spectrum"]
        console.print(
            f"ResNet-18, {found['images']} images: {found['products']} products in {found['seconds']:.0f} s "
            f"({found['processor seconds']:.0f} s of the processor); trace {found['trace']:.4g}, largest eigenvalue "
            f"{found['largest']:.4g}"
        )


def main() -> None:
    """Runs the benchmark; a part that is left out stays as it was in the file."""
    parser = argument_parser(MODULE, __doc__)
    add = parser.add_argument
    add("--only", choices=PARTS, default=None, help="one of the parts")
    add("--steps", type=int, default=200, metavar="N", help="of training")
    add("--examples", type=int, default=256, metavar="N", help="digits in the matrix")
    add("--few", type=int, default=16, metavar="N", help="digits in the matrix whose exact blocks are inverted")
    add("--rank", type=int, default=16, metavar="R", help="of the preconditioner and of training")
    add("--damping", type=float, default=1e-3, help="of the system")
    add("--dampings", type=float, nargs="+", default=[1e-3, 1e-1, 1.0], metavar="D", help="of the preconditioner")
    add("--most", type=int, default=10000, metavar="N", help="most products without a preconditioner")
    add("--images", type=int, default=32, metavar="N", help="in the ResNet's matrix")
    add("--lanczos", type=int, default=20, metavar="N", help="steps of Lanczos")
    add("--samples", type=int, default=1, metavar="N", help="random vectors")
    arguments = parser.parse_args()
    run = {
        "environment": environment(arguments.threads, torch.device(arguments.device)),
        **command_of(MODULE, vars(arguments)),
    }
    measured: dict[str, Any] = {}
    for part, function in {"systems": systems, "blocks": blocks, "spectrum": spectrum}.items():
        if arguments.only in (None, part):
            measured |= {part: function(arguments), f"{part} run": run}
    path: Path = arguments.output / f"spectra_{arguments.device}.json"
    content: dict[str, Any] = {**(json.loads(path.read_text()) if path.exists() else {}), **measured}
    console = wide_console()
    show(content, console)
    write_results(path, content, draw(content), console)


if __name__ == "__main__":
    main()
