"""Figures from the training runs of ``time_to_loss``, for ``benchmarks.figures``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple

from benchmarks.common import RESULTS
from benchmarks.methods import METHODS, Settings
from benchmarks.runs import Results, Run
from benchmarks.time_to_loss_report import Line, settings_text

NOTHING = "–"


class Row(NamedTuple):
    """A problem in the tables.

    Attributes:
        title: Its first cell.
        files: What follows ``time_to_loss-`` in the names of its files; where several have a method, the newest counts.
        target: The loss to reach where steps are compared; ``None`` where the last loss is.
        rank: Of ours.
    """

    title: str
    files: tuple[str, ...]
    target: float | None = None
    rank: int = 16


PROBLEMS = {
    "digits_autoencoder": Row("`digits_autoencoder`, 1000 steps", ("digits_autoencoder-batch256-steps1000-cpu",)),
    "digits_autoencoder-compiled": Row("the same, compiled", ("digits_autoencoder-batch256-steps1000-cpu-compiled",)),
    "digits_autoencoder-750": Row("the same, batch 750", ("digits_autoencoder-batch750-steps1000-cpu",)),
    "deep_narrow": Row("`deep_narrow`, 1000 steps", ("deep_narrow-batch256-steps1000-cpu",)),
    "deep_autoencoder": Row(
        "`deep_autoencoder` (MNIST), 30 epochs", ("deep_autoencoder-relu-mnist-batch1000-steps1800-cpu",), rank=32
    ),
    "deep_autoencoder-180": Row(
        "`deep_autoencoder` (MNIST), 3 epochs", ("deep_autoencoder-relu-mnist-batch1000-steps180-cpu",)
    ),
    "digits_classifier": Row(
        "`digits_classifier`, steps to 0.01",
        ("digits_classifier-batch256-steps500-cpu", "digits_classifier-batch256-steps100-cpu"),
        target=0.01,
    ),
    "digits_cnn": Row("`digits_cnn`, steps to 0.01", ("digits_cnn-batch256-steps300-cpu",), target=0.01),
    "regression": Row("`regression` (diabetes), 1000 steps", ("regression-batch128-steps1000-cpu",)),
    "characters": Row("`characters` (transformer, batch 32), 300 steps", ("characters-batch32-steps300-cpu",)),
    "fashion_cnn": Row("`fashion_cnn`", ("fashion_cnn-fashion-batch128-steps468-cpu",), rank=32),
    "gpt": Row("`gpt`", ("gpt-bible-batch8-steps50-cpu",)),
}
ADAPTIVE, AVERAGED, SPECTRAL = "adaptive", "averaged", "untuned_spectral"
COMPARED = (ADAPTIVE, AVERAGED, SPECTRAL, "adam", "adamw", "muon", "shampoo", "soap-1", "kfac", "low_rank_kfac")


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [list(headings), ["---"] * len(headings), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(x: float) -> str:
    """Four digits; small numbers as powers of ten."""
    if not math.isfinite(x):
        return "diverged"
    if x == 0:
        return "0"
    return f"{x:.2f}" if x >= 0.1 else f"{x:.1e}".replace("e-0", "e-")


@cache
def results(file: str) -> Results:
    path = RESULTS / f"time_to_loss-{file}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such results; remove the figure, or run the benchmark")
    return Results(path)


def line(problem: str, method: str, rank: int | None = None) -> Line | None:
    """The runs of a method under its best settings, of the file in which they are newest."""
    of_method = [best(problem, file, method, rank or PROBLEMS[problem].rank) for file in PROBLEMS[problem].files]
    found = [one for one in of_method if one is not None]
    return max(found, key=lambda one: day(problem, one.runs)) if found else None


def best(problem: str, file: str, method: str, rank: int) -> Line | None:
    """The best of a method's settings that ran from the most seeds, by what the problem judges."""
    by_settings: dict[str, list[Run]] = {}
    for run in results(file).runs.values():
        if run.method == method and (not METHODS[method].ranked or run.settings["rank"] == rank):
            by_settings.setdefault(run.key.settings, []).append(run)
    most = max(map(len, by_settings.values()), default=0)
    tried = [Line(method, METHODS[method].label, runs) for runs in by_settings.values() if len(runs) == most]
    return min(tried, key=lambda one: (judged(problem, one), one.loss)) if tried else None


def day(problem: str, runs: Sequence[Run]) -> str:
    """When the first of them was made."""
    of_files = [results(file) for file in PROBLEMS[problem].files]
    return min(one.environments[run.environment]["started"] for one in of_files for run in runs
               if one.runs.get(run.key) is run)  # fmt: skip


def judged(problem: str, found: Line) -> float:
    """The last loss, or the steps to the target: the less, the better."""
    target = PROBLEMS[problem].target
    return found.loss if target is None else found.reaches(target)[0]


def shown(problem: str, found: Line | None) -> str:
    """The same as text."""
    if found is None:
        return NOTHING
    value = judged(problem, found)
    if PROBLEMS[problem].target is None:
        return number(value)
    return f"{value:.0f}" if math.isfinite(value) else "never"


def rivals(problem: str) -> list[Line]:
    """The best of each tuned method that is not of this package."""
    names = [name for name in METHODS if not METHODS[name].ours and "kfac" not in name and name != "spectral"]
    return [found for name in names if (found := line(problem, name)) is not None]


def untuned() -> str:
    """The chains with nothing to tune beside the best tuned rival and Adam."""
    rows = []
    for problem, row in PROBLEMS.items():
        ours = [line(problem, method) for method in (ADAPTIVE, AVERAGED, SPECTRAL)]
        if not any(ours) or problem == "digits_autoencoder-compiled":
            continue
        best = min(rivals(problem), key=lambda found: judged(problem, found))
        seeds = sorted({len(found.runs) for found in ours if found is not None})
        made = sorted({day(problem, found.runs)[:10] for found in ours if found is not None})
        rows.append([
            row.title, *(shown(problem, found) for found in ours), f"{best.label}: {shown(problem, best)}",
            shown(problem, line(problem, "adam")), ", ".join(map(str, seeds)), 
            " to ".join(dict.fromkeys((made[0], made[-1]))),
        ])  # fmt: skip
    headings = ["problem", "adaptive", "adaptive, averaged", "spectral, averaged", "best tuned rival", "Adam, tuned",
                "our seeds", "ours recorded"]  # fmt: skip
    return markdown(headings, rows)


def losses(*problems: str) -> str:
    """The same, methods by rows and problems by columns."""
    rows = [[METHODS[name].label, *(shown(problem, line(problem, name)) for problem in problems)] for name in COMPARED]
    return markdown(["method", *(PROBLEMS[problem].title for problem in problems)], rows)


def methods(problem: str, *names: str) -> str:
    """Methods by rows: settings tried, loss, state."""
    rows = []
    for name in names:
        found = line(problem, name)
        if found is None:
            raise ValueError(f"figure methods: {problem} has no run of {name}")
        chosen, runs = found.runs[0], [run for file in PROBLEMS[problem].files for run in results(file).runs.values()]
        tried = len({run.key.settings for run in runs
                     if run.method == name and run.settings.get("rank") == chosen.settings.get("rank")})  # fmt: skip
        label = f"{found.label}, rank {chosen.settings['rank']}" if METHODS[name].ranked else found.label
        rows.append([label, "none to choose" if METHODS[name].ours else str(tried), str(len(found.runs)),
                     shown(problem, found), f"{chosen.state_bytes:,}"])  # fmt: skip
    loss = "steps to the target" if PROBLEMS[problem].target is not None else "loss [nats]"
    return markdown(["method", "settings tried", "seeds", loss, "state [bytes]"], rows)


def settings(problem: str) -> str:
    """Every method under every setting that ran, the best first."""
    (file,) = PROBLEMS[problem].files
    by_settings: dict[tuple[str, str], list[Run]] = {}
    for run in results(file).runs.values():
        by_settings.setdefault((run.method, run.key.settings), []).append(run)
    lines = sorted((Line(method, METHODS[method].label, runs) for (method, _), runs in by_settings.items()),
                   key=lambda found: found.loss)  # fmt: skip
    tested = bool(lines[0].runs[0].accuracy)
    rows = []
    for found in lines:
        accuracy = ", ".join(f"{run.accuracy[-1]:.3f}" for run in found.runs) if tested else ""
        text = settings_text(found.runs[0].settings).replace("none", NOTHING)
        rows.append([found.label, text, str(len(found.runs)), f"{found.loss:.3f}", *([accuracy] if tested else [])])
    return markdown(
        ["method", "settings", "seeds", "loss [nats]", *(["test accuracy by seed"] if tested else [])], rows
    )


def ranks(problem: str, method: str) -> str:
    """The last loss of a method by rank."""
    tried = sorted({run.settings["rank"] for run in results(PROBLEMS[problem].files[0]).runs.values()
                    if run.method == method})  # fmt: skip
    cells = [shown(problem, line(problem, method, rank)) for rank in tried]
    return markdown(["rank", *map(str, tried)], [["loss [nats]", *cells]])


def dampings(*problems: str) -> str:
    """Low-rank K-FAC's last loss, or steps to the target, by damping and clip; dense where low rank has not run."""
    rows = []
    for clip in (1e-3, 1e-2):
        for damping in (0.1, 0.03, 0.01, 0.003):
            wanted = {"damping": damping, "kl_clip": clip}
            cells = [shown(problem, of_settings(problem, wanted)) for problem in problems]
            default = ", the defaults" if (damping, clip) == (0.03, 1e-3) else ""
            rows.append([f"{damping:g}, {clip:g}{default}", *cells])
    found = [of_settings(problem, {}) for problem in problems]
    titles = [PROBLEMS[problem].title + ", dense factors" * (one is not None and one.method == "kfac")
              for problem, one in zip(problems, found, strict=True)]  # fmt: skip
    return markdown(["damping, `kl_clip`", *titles], rows)


def of_settings(problem: str, wanted: Settings) -> Line | None:
    """Seed 0 of K-FAC under some settings, of low rank where that has run."""
    for method in ("low_rank_kfac", "kfac"):
        runs = [run for run in results(PROBLEMS[problem].files[0]).runs.values()
                if run.method == method and run.seed == 0 and wanted.items() <= run.settings.items()]  # fmt: skip
        if runs:
            return Line(method, METHODS[method].label, runs[:1])
    return None


def loss(problem: str, method: str, rank: str = "") -> str:
    """One number: the last loss, or the steps to the target."""
    return shown(problem, line(problem, method, int(rank) if rank else None))


def step_time(problem: str, method: str, other: str) -> str:
    """The time of a step in steps of another method, which the same command trained in turn with it."""
    pair = [line(problem, name) for name in (method, other)]
    environments = {run.environment for found in pair if found is not None for run in found.runs}
    if None in pair or len(environments) > 1:
        raise ValueError(f"figure step_time: {method} and {other} of {problem} were not run by one command")
    seconds = [statistics.median(run.seconds[-1] / run.steps[-1] for run in found.runs) for found in pair if found]
    return f"{seconds[0] / seconds[1]:.1f}"


FIGURES: dict[str, Callable[..., str]] = {
    "untuned": untuned, "losses": losses, "methods": methods, "settings": settings, "ranks": ranks,
    "dampings": dampings, "loss": loss, "step_time": step_time,
}  # fmt: skip
