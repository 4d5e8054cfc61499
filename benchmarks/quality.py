"""How near preconditioning by low rank comes to dense K-FAC, by rank, on the factors of a trained network.

python -m benchmarks.quality
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import optree
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
    write_results,
)
from benchmarks.problems import PROBLEMS
from lrkfac.core.curvature.covariances import kronecker_factors
from lrkfac.core.layers.matrix import layer_matrix
from lrkfac.core.linalg.operators import Kronecker, LowRankPlusDiagonal, split_damping

MODULE = "benchmarks.quality"
DENSE, OURS, BEST, TRUNCATED, PLAIN = "dense", "low rank", "eigenvectors", "eigenvectors, no rest", "plain gradient"
DECAY = 0.95
LEARNING_RATE, REFRESH, TRAINING_RANK = 0.1, 5, 16


class Layer:
    """The factors of one layer in one structure, averaged over batches."""

    def __init__(self, layer: lrkfac.Layer, structure: Any, like: Tensor) -> None:
        self.layer, self.structure = layer, structure.fitted(layer.d_in, layer.d_out)
        self.state = self.structure.init(layer.d_in, layer.d_out, like)

    def update(self, statistics: lrkfac.Statistics) -> None:
        """Takes in one batch."""
        name = self.layer.name
        both = kronecker_factors(
            self.layer, statistics.inputs[name], statistics.output_gradients[name], statistics.scale
        )
        self.state = self.structure.update(self.state, *both, DECAY)

    def natural(self, gradient: Tensor, damping: float) -> Tensor:
        """The preconditioned gradient."""
        return self.structure.inverse(self.state, damping).two_sided(gradient)


def truncated(matrix: Tensor, rank: int, rest: bool) -> LowRankPlusDiagonal:
    """The dominant eigenpairs of a matrix, exactly, and the mean of the other eigenvalues for the rest."""
    d = matrix.shape[0]
    values, vectors = torch.linalg.eigh(matrix)
    kept, missed = values[-rank:], values[: max(0, d - rank)]
    residual = missed.mean() if rest and len(missed) else values.new_zeros(())
    return LowRankPlusDiagonal(vectors[:, -rank:], kept - residual, residual.expand(d))


def best(dense: Kronecker, rank: int, gradient: Tensor, damping: float, rest: bool) -> Tensor:
    """The gradient preconditioned by the truncated factors, damped as the dense ones are."""
    input_damping, output_damping = split_damping(dense, damping)
    output, input = (
        lrkfac.linalg.inverse(truncated(side.to_dense(), rank, rest), shift)
        for side, shift in ((dense.output, output_damping), (dense.input, input_damping))
    )
    return output.matvec(input.of_rows(gradient))


def difference(natural: Sequence[Tensor], dense: Sequence[Tensor]) -> dict[str, float]:
    """Angle in degrees and relative error of all layers together."""
    x, y = (torch.cat([part.flatten() for part in parts]) for parts in (natural, dense))
    cosine = (x @ y / (x.norm() * y.norm())).clamp(-1, 1)
    return {"angle": math.degrees(math.acos(cosine)), "error": float((x - y).norm() / y.norm())}


def trained(problem: Any, steps: int) -> tuple[Any, lrkfac.Layers]:
    """Parameters after so many steps of low-rank K-FAC."""
    params = problem.init(0)
    layers = lrkfac.find_layers(problem.model, params, problem.inputs[:2], strict=True)
    evaluate = lrkfac.evaluator(problem.model, problem.likelihood, layers)
    tx = lrkfac.low_rank_kfac(layers, LEARNING_RATE, TRAINING_RANK)
    state = tx.init(params)
    for i, batch in enumerate(islice(problem.batches(problem.batch_size, 0), steps)):
        e = evaluate(params, problem.inputs[batch], problem.targets[batch], statistics=i % REFRESH == 0)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        params = lrkfac.apply_updates(params, updates)
    return params, layers


def measured(problem: Any, steps: int, refreshes: int, ranks: Sequence[int], damping: float) -> dict[str, Any]:
    """By rank: ours and what exact eigenvectors make of the same averages; float64, as differences are small."""
    torch.manual_seed(0)
    params, layers = trained(problem, steps)
    loss = problem.loss(params)
    params = optree.tree_map(lambda leaf: leaf.double(), params)
    inputs = problem.inputs.double() if problem.inputs.is_floating_point() else problem.inputs
    targets = problem.targets.double() if problem.targets.is_floating_point() else problem.targets
    evaluate = lrkfac.evaluator(problem.model, problem.likelihood, layers)
    like = torch.zeros((), dtype=torch.float64)
    largest = max(max(layer.d_in, layer.d_out) for layer in layers)
    ranks = sorted({*(rank for rank in ranks if rank < largest), largest})
    structures = {DENSE: lrkfac.structures.kronecker(lrkfac.structures.dense(), lrkfac.structures.dense())}
    structures |= {
        rank: lrkfac.structures.kronecker(
            lrkfac.structures.low_rank(rank), lrkfac.structures.low_rank_plus_diagonal(rank)
        )
        for rank in ranks
    }
    held = {name: [Layer(layer, structure, like) for layer in layers] for name, structure in structures.items()}
    for batch in islice(problem.batches(problem.batch_size, 1), refreshes):
        evaluation = evaluate(params, inputs[batch], targets[batch])
        for of_name in held.values():
            for one in of_name:
                one.update(evaluation.statistics)
    grads = evaluate(params, inputs, targets, statistics=False).grads
    gradients = [layer_matrix(layer, optree.tree_leaves(grads)).joined() for layer in layers]
    dense = [one.natural(g, damping) for one, g in zip(held[DENSE], gradients, strict=True)]
    operators = [one.structure.operator(one.state) for one in held[DENSE]]
    rows = [{"rank": 0, "name": PLAIN, **difference(gradients, dense)}]
    for rank in ranks:
        ours = [one.natural(g, damping) for one, g in zip(held[rank], gradients, strict=True)]
        rows.append({"rank": rank, "name": OURS, **difference(ours, dense)})
        for name, rest in ((BEST, True), (TRUNCATED, False)):
            exact = [best(operator, rank, g, damping, rest) for operator, g in zip(operators, gradients, strict=True)]
            rows.append({"rank": rank, "name": name, **difference(exact, dense)})
    shapes = [[layer.d_out, layer.d_in] for layer in layers]
    return {"rows": rows, "layers": shapes, "loss": loss}


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Angle and error against the rank."""
    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    for axis, key, label in zip(
        figure.subplots(1, 2), ("angle", "error"), ("angle [degrees]", "relative error"), strict=True
    ):
        for name, colour in zip((OURS, BEST, TRUNCATED), COLOURS, strict=False):
            some = [row for row in rows if row["name"] == name]
            axis.plot([row["rank"] for row in some], [row[key] for row in some], marker="o", color=colour, label=name)
        axis.axhline(rows[0][key], color=COLOURS[7], linestyle=":", label=PLAIN)
        axis.set_xscale("log", base=2)
        axis.set_yscale("symlog", linthresh=1e-3)
        ranks = sorted({row["rank"] for row in rows[1:]})
        axis.set_xticks(ranks, [str(rank) for rank in ranks])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel("rank")
        axis.set_ylabel(f"{label}\nto the step of dense K-FAC")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=7)
    return figure


def main() -> None:
    """Runs the benchmark."""
    parser = argument_parser(MODULE, __doc__)
    add = parser.add_argument
    problems = ("digits_autoencoder", "digits_classifier", "deep_narrow")
    add("--problem", choices=problems, default="digits_autoencoder", help="whose network is trained")
    add("--steps", type=int, default=300, metavar="N", help="of training")
    add("--refreshes", type=int, default=30, metavar="K", help="batches in the running averages after it")
    add("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], metavar="R", help="and the full one")
    add("--damping", type=float, nargs="+", default=[1e-1, 1e-2, 1e-3], metavar="λ", help="Tikhonov damping")
    arguments = parser.parse_args()
    console = wide_console()
    described = environment(arguments.threads, torch.device("cpu")) | command_of(MODULE, vars(arguments))
    problem = PROBLEMS[arguments.problem](None, "relu")
    found = []
    for damping in arguments.damping:
        with console.status(f"measuring damping {damping}"):
            one = measured(problem, arguments.steps, arguments.refreshes, arguments.ranks, damping)
        found.append({"damping": damping, **one})
        by_rank = {(row["rank"], row["name"]): row for row in one["rows"]}
        headings = ["rank", *(f"{key}: {name}" for key in ("angle", "error") for name in (OURS, BEST, TRUNCATED))]
        title = f"{problem.title}, damping {damping:g}: against the step of dense K-FAC (angle in degrees)"
        console.print(results_table(title, headings, [
            [str(rank), *(f"{by_rank[rank, name]['angle']:.3g}" for name in (OURS, BEST, TRUNCATED)),
             *(f"{by_rank[rank, name]['error']:.2g}" for name in (OURS, BEST, TRUNCATED))]
            for rank in dict.fromkeys(row["rank"] for row in one["rows"][1:])
        ]))  # fmt: skip
        plain = one["rows"][0]
        console.print(f"plain gradient: {plain['angle']:.3g} degrees; training loss {one['loss']:.3g} nats")
    console.print(
        f"{OURS}: low_rank(r) and low_rank_plus_diagonal(r), one iteration per batch; {BEST}: the dominant ones of the "
        "same averages, exactly, what they miss spread evenly; no rest: what they miss left out"
    )
    console.print(described)
    path = arguments.output / f"quality-{arguments.problem}_cpu.json"
    middle = found[len(found) // 2]["rows"]
    write_results(path, {"environment": described, "measured": found}, draw(middle), console)


if __name__ == "__main__":
    main()
