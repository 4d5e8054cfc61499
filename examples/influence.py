"""Influence functions: which training examples affect a prediction, checked by training without a quarter of them.

python -m examples.influence
python -m examples.influence --model gpt
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import lrkfac
from examples.common import TRAINING_EXAMPLES, digits
from examples.minimum import Params, minimum, squared_length
from examples.report import positive, save_table
from examples.text import init_transformer, text_windows, transformer
from lrkfac.curvature import estimate, influence
from lrkfac.structures import dense, full, kronecker, low_rank, low_rank_plus_diagonal

HIDDEN = 16
CONTEXT, WIDTH, SEQUENCES, QUERIES = 24, 16, 384, 64  # of the GPT with two blocks


class Task(NamedTuple):
    """A trained model, its data, and how its curvature is represented."""

    model: Callable[[Params, Tensor], Tensor]
    start: Params
    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor
    likelihood: Any
    structures: dict[str, tuple[Any, bool]]
    iterations: int


def low(rank: int) -> Any:
    """The default structure of this rank."""
    return kronecker(low_rank(rank), low_rank_plus_diagonal(rank))


LOW = {f"rank {rank}": (low(rank), True) for rank in (4, 8, 16, 32)}
DENSE = kronecker(dense(), dense())


def digits_task(seed: int) -> Task:
    """A classifier of digits."""
    pixels, labels = digits()
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10)).double()
    model, start = lrkfac.from_module(net)
    n = TRAINING_EXAMPLES
    structures = {"exact Gauss-Newton": (full(), True), "dense K-FAC": (DENSE, True), "dense, split": (DENSE, False)}
    data = pixels[:n].double(), labels[:n], pixels[n:].double(), labels[n:]
    return Task(model, start, *data, lrkfac.categorical(), structures | LOW, 300)


def gpt_task(seed: int) -> Task:
    """A GPT of two blocks on Python's reference; an example is a window of the text."""
    x, y, kinds = text_windows(CONTEXT)
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: SEQUENCES + QUERIES]
    x, y = x[chosen], y[chosen]
    start = {name: p.double() for name, p in init_transformer(seed, kinds, CONTEXT, WIDTH, blocks=2).items()}
    data = x[:SEQUENCES], y[:SEQUENCES], x[SEQUENCES:], y[SEQUENCES:]
    structures = {"dense K-FAC": (DENSE, True), "dense, split": (DENSE, False)} | LOW
    return Task(transformer, start, *data, lrkfac.categorical(axis=-1), structures, 60)


def losses(task: Task, params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of each example, the sum over its terms, ``[n]``."""
    logits = task.model(params, x).flatten(0, -2)
    return F.cross_entropy(logits, y.flatten(), reduction="none").reshape(len(x), -1).sum(1)


def trained(task: Task, start: Params, decay: float, kept: Tensor | None = None) -> Params:
    """Return the minimum of the loss of the kept examples, each with its weight in the mean of all, plus decay."""
    x, y = (task.x, task.y) if kept is None else (task.x[kept], task.y[kept])
    terms = task.y.numel()

    def objective(params: Params) -> Tensor:
        return losses(task, params, x, y).sum() / terms + decay / 2 * squared_length(params)

    return minimum(objective, start, task.iterations)


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return Spearman's correlation of each column, ``[q]``."""
    centred = [(z.argsort(0).argsort(0).to(z.dtype) - (len(z) - 1) / 2) for z in (x, y)]
    return (centred[0] * centred[1]).sum(0) / (centred[0].norm(dim=0) * centred[1].norm(dim=0))


def measured(
    task: Task, decay: float, retrainings: int, names: Sequence[str], seed: int, console: Console
) -> tuple[Table, Params, dict[str, Tensor], Tensor, Tensor]:
    """Return the table, the parameters, the influences by structure, and predicted and true changes of losses."""
    params = trained(task, task.start, decay)
    generator = torch.Generator().manual_seed(seed)
    left_out = torch.zeros(retrainings, len(task.x), dtype=torch.float64)
    changes = []
    for row in track(left_out, "training without a quarter", console=console):
        row[torch.randperm(len(row), generator=generator)[: len(row) // 4]] = 1
        without = trained(task, params, decay, row == 0)
        of_both = [losses(task, p, task.query_x, task.query_y) for p in (without, params)]
        changes.append(of_both[0] - of_both[1])
    true = torch.stack(changes)
    layers = lrkfac.find_layers(task.model, params, task.x)
    at_targets = lrkfac.evaluator(task.model, task.likelihood, layers, "empirical")
    # The exact square root has a column for each logit of an example: thousands for a sequence.
    of_terms = task.y.ndim > 1
    options = {"estimator": "mc", "samples": 4} if of_terms else {"estimator": "exact"}
    of_fisher = lrkfac.evaluator(task.model, task.likelihood, layers, **options)
    batches = list(zip(task.x.split(128), task.y.split(128), strict=True))
    queries = at_targets(params, task.query_x, task.query_y)
    score = Table(title=f"linear datamodeling score, decay {decay:g}", title_justify="left", box=SIMPLE)
    score.add_column("curvature", no_wrap=True)
    score.add_column(f"of {retrainings} retrainings", justify="right")
    influences, predicted = {}, true
    for name in track(names, "influences", console=console):
        structure, exactly = task.structures[name]
        fisher = estimate(of_fisher, params, batches, layers, structure)
        influences[name] = influence(fisher, queries, (at_targets(params, *b) for b in batches), decay, exact=exactly)
        predicted = left_out @ influences[name].mT / task.y.numel()
        score.add_row(name, f"{rank_correlation(predicted, true).mean():.3f}")
    return score, params, influences, predicted, true


def _draw(path: Path, task: Task, influences: Tensor, predicted: Tensor, true: Tensor) -> None:
    """Draw predicted beside true changes; of digits, the most and least helpful examples of some queries, too."""
    of_digits = task.x.is_floating_point()
    with matplotlib.rc_context({"font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10}):
        figure = Figure(figsize=(11 if of_digits else 5, 4.4), dpi=150, layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3)) if of_digits else (figure, None)
        axis = left.subplots()
        hardest = true.std(0).argsort(descending=True)[:3].tolist()
        for i in hardest:
            axis.scatter(predicted[:, i].numpy(), true[:, i].numpy(), s=14, label=f"query {i}")
        axis.set_xlabel("predicted change of the loss [nats]")
        axis.set_ylabel("change after retraining [nats]")
        axis.set_title("without a quarter of the examples", loc="left")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        if right is not None:
            for row, i in zip(right.subplots(3, 9), hardest, strict=True):
                order = influences[i].argsort(descending=True)
                shown = [(task.query_x[i], f"query: {task.query_y[i]}")]
                shown += [(task.x[n], f"+ {task.y[n]}") for n in order[:4]]
                shown += [(task.x[n], f"− {task.y[n]}") for n in order[-4:].flip(0)]
                for cell, (image, title) in zip(row, shown, strict=True):
                    cell.imshow(image.reshape(8, 8).numpy(), cmap="gray_r")
                    cell.set_title(title)
                    cell.axis("off")
        figure.savefig(path)


TASKS = {"digits": digits_task, "gpt": gpt_task}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console()
    task = TASKS[options.model](options.seed)
    task = task._replace(x=task.x[: options.examples], y=task.y[: options.examples])
    names = [name for name in task.structures if not options.structures or name in options.structures]
    if not names:
        raise SystemExit(f"structures: expected some of {list(task.structures)}, got {options.structures}")
    run = partial(measured, task, options.decay, options.retrainings, names, options.seed)
    table, _, influences, predicted, true = run(console)
    console.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    picture = options.output / ("influence.png" if options.model == "digits" else f"influence_{options.model}.png")
    _draw(picture, task, influences[names[-1]], predicted, true)
    save_table(table, picture.with_suffix(".json"))
    console.print(f"wrote {picture} and {picture.with_suffix('.json')}", highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.influence",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=list(TASKS), default="digits", help="what is trained")
    add("--decay", type=float, default=1e-2, metavar="D", help="weight decay: D / 2 times the squared norm in the loss")
    add("--retrainings", type=positive, default=24, metavar="N", help="runs, each without a quarter of the examples")
    add("--examples", type=positive, default=TRAINING_EXAMPLES, metavar="N", help="maximum number of training examples")
    add("--structures", nargs="+", metavar="NAME", help="rows of the table (all by default)")
    add("--seed", type=int, default=0, metavar="S", help="seed of all random numbers")
    add("--threads", type=positive, default=1, metavar="N", help="CPU threads")
    add("--output", type=Path, default=Path("examples/output"), metavar="DIR", help="folder for the results")
    return parser


if __name__ == "__main__":
    main()
