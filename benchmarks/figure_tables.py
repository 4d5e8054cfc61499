"""Figures of time, memory and structures, for ``benchmarks.figures``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.figure_runs import NOTHING, loss, markdown, number
from benchmarks.physics import best
from benchmarks.settings import CHANGES, STEPS

CLOCK = ", processors"
"""What the names of figures end in that count seconds of processors."""


@cache
def recorded(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such results; remove the figure, or run the benchmark")
    return json.loads(path.read_text())


def cell(value: float | None, form: str = ".2f") -> str:
    return NOTHING if value is None else format(value, form)


def row_of(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any]:
    """The row with these values; empty if there is none."""
    return next((row for row in rows if wanted.items() <= row.items()), {})


def widths() -> str:
    """The mean step by width, beside a refresh and its dense one: what low rank saves."""
    steps, refreshes = recorded("step_eager_cpu")["measured"], recorded("refresh_eager_cpu")["widths"]
    sizes = [one["width"] for one in steps]
    rows = [
        [f"mean step of {text} / SGD step", *(cell(row_of(one["rows"], step=name).get("mean ratio")) for one in steps)]
        for name, text in (("rank 32", "rank 32"), ("dense K-FAC", "dense K-FAC"))
    ]
    ratios = [row_of(refreshes, width=size).get("ratios", {}).get("dense, Cholesky") for size in sizes]
    rows.append(["refresh of a layer, dense / rank 32", *(cell(ratio and 1 / ratio, ".0f") for ratio in ratios)])
    return markdown(["width of the three layers, batch 128", *map(str, sizes)], rows)


def costs() -> str:
    """What a step costs and brings, of four methods: time by width, state, and loss of the digits autoencoder."""
    titles = {"SGD, momentum": ("SGD, momentum", "sgd"), "Adam": ("Adam", "adam"),
              "rank 32": ("low-rank K-FAC", "low_rank_kfac"), "dense K-FAC": ("dense K-FAC", "kfac")}  # fmt: skip
    rows = []
    for one in recorded("step_eager_cpu")["measured"][::2]:
        of_each = [row_of(one["rows"], step=step) for step in titles]
        ratios = [row.get("mean ratio") or row.get("ratio") for row in of_each]
        rows.append([f"mean step at width {one['width']} / SGD step", *[cell(ratio) for ratio in ratios]])
    states = [row_of(recorded("memory_steps_cpu")["steps"], method=name, width=2048) for name, _ in titles.values()]
    rows.append(["numbers kept for each parameter, width 2048", *[cell(x["state"] / x["parameters"]) for x in states]])
    losses = [loss("digits_autoencoder", method) for _, method in titles.values()]
    rows.append(["loss of the autoencoder below after 1000 steps, tuned", *losses])
    return markdown(["", "SGD, momentum", "Adam", "low-rank K-FAC", "dense K-FAC"], rows)


def steps(*names: str) -> str:
    """A step with a refresh and the mean step of each file, in SGD steps."""
    rows = []
    for name in names:
        content = recorded(name)
        for one in content["measured"]:
            size = f"{content['size']} {one[content['size']]}"
            for row in one["rows"]:
                if "mean ratio" in row:
                    rows.append([name.removesuffix("_cpu").replace("_", ", "), size, row["step"], cell(row["ratio"]),
                                 cell(row["refresh ratio"]), cell(row["mean ratio"])])  # fmt: skip
    return markdown(["network", "size", "method", "plain step", "step with refresh", "mean of ten"], rows)


def refreshes() -> str:
    """An update with its inverses, densely, in units of rank 32."""
    content = recorded("refresh_eager_cpu")
    rows = []
    for one in content["widths"]:
        ratios = [one["ratios"].get(name) for name in ("dense, Cholesky", "dense, eigenvectors")]
        rows.append([str(one["width"]), f"{1e3 * one['seconds']['low rank']:.1f}",
                     *(cell(ratio and 1 / ratio, ".0f") for ratio in ratios)])  # fmt: skip
    headings = ["width", "rank 32 [ms]", "dense by Cholesky / rank 32", "dense by eigenvectors / rank 32"]
    return markdown(headings, rows)


def depth() -> str:
    """Calls of operations and times by the number of layers."""
    rows = [[str(one["depth"]), str(one["operations"]["refresh"]), str(one["operations"]["apply"]),
             cell(one["ours"]["mean ratio"])] for one in recorded("depth_eager_cpu")["depths"]]  # fmt: skip
    return markdown(["layers", "calls in a refresh", "calls in an application", "mean step / SGD step"], rows)


def compiling() -> str:
    """First calls in seconds of processors, later steps beside eager ones."""
    rows = []
    for way in recorded("compile_cpu")["ways"]:
        if way["way"] != "eager":
            first, later = ([way[of][which] for which in names] for of, names in OF_COMPILING.items())
            rows.append([way["way"], *(f"{seconds:.0f}" for seconds in first), *map(cell, later)])
    headings = ["compiled", "first call with statistics", "without", "plain step / eager", "refresh step / eager"]
    return markdown(headings, rows)


OF_COMPILING = {"seconds": ("refresh", "plain"), "ratios": ("plain", "refresh")}


def memory() -> str:
    """Peaks of steps and the numbers of the state, by width."""
    rows = [[str(row["width"]), row["method"], f"{row['state'] / row['parameters']:.2f}", cell(row["ratio"])]
            for row in recorded("memory_steps_cpu")["steps"]]  # fmt: skip
    return markdown(["width", "method", "state / parameters", "peak / functional SGD with momentum"], rows)


def structures() -> str:
    """The adaptive chain by structure of its factors."""
    files = {"`deep_narrow`": "deep_narrow-batch256", "`digits_autoencoder`": "digits_autoencoder-batch256",
             "the same, full batch": "digits_autoencoder-batch1500"}  # fmt: skip
    measured = {
        title: recorded(f"adaptive_structures-{file}-steps300_cpu")["measured"] for title, file in files.items()
    }
    names = dict.fromkeys((row["structure"], row["rank"]) for rows in measured.values() for row in rows)
    rows = []
    for name, rank in names:
        cells = []
        for found in measured.values():
            of_name = [row for row in found if (row["structure"], row["rank"]) == (name, rank)]
            ordered = sorted(of_name, key=lambda row: row["seed"])
            cells.append(", ".join(f"{row['loss'][-1]:.2f}" for row in ordered) or NOTHING)
        rows.append([f"{name}, rank {rank}" if name != "dense" else name, *cells])
    return markdown(["structure", *measured], rows)


def changes() -> str:
    """The last loss of short runs, or the accuracy, with one of low-rank K-FAC's defaults changed."""
    runs = recorded("settings_cpu")["runs"]
    names = [name for name in STEPS if any(run["problem"] == name for run in runs)]
    rows = []
    for change in CHANGES:
        found = [row_of(runs, problem=name, change=change) for name in names]
        cells = [f"{run['accuracy']:.3f}" if "accuracy" in run else number(run["loss"]) if run else NOTHING
                 for run in found]  # fmt: skip
        text = ", ".join(f"`{name}` {value}" for name, value in change.items()) or "none"
        if any(found):
            rows.append([text, *cells])
    return markdown(["change", *(f"`{name}`" for name in names)], rows)


def frameworks() -> str:
    """kfac-jax and ours in SGD steps of their frameworks, by seconds of processors."""
    measured = recorded("kfac_jax_cpu")["measured"]
    names = dict.fromkeys((row["framework"], row["step"]) for one in measured for row in one["rows"])
    rows = []
    for framework, step in names:
        if step == "SGD":
            continue
        cells = []
        for one in measured:
            row = row_of(one["rows"], framework=framework, step=step)
            pair = [row.get("ratio" + CLOCK), row.get("mean ratio" + CLOCK)]
            cells.append(", ".join(cell(value, ".1f") for value in pair) if row else NOTHING)
        library = "kfac-jax" if framework == "JAX" else "ASDL" if step == "ASDL" else "lrkfac"
        rows.append([library, "dense, statistics every ten" if step == "ASDL" else step, *cells])
    return markdown(["library", "step", *(one["size"] for one in measured)], rows)


def sent() -> str:
    """Bytes that a process hands to all-reduce in a refresh."""
    rows = [[str(one["processes"]), f"3 x {one['width']}",
             *(f"{one['bytes'][name] / 1e6:.2f}" for name in ("gradient", "low rank", "dense"))]
            for one in recorded("distributed_cpu")["counted"]]  # fmt: skip
    headings = ["processes", "layers", "gradient [MB]", "refresh, rank 32 [MB]", "refresh, dense [MB]"]
    return markdown(headings, rows)


def modelled(processes: str) -> str:
    """Modelled, not measured, times of collectives."""
    rows = []
    for one in recorded("distributed_cpu")["model"]:
        row = row_of(one["rows"], GPUs=int(processes))
        cells = [row["gradient"], *(row["refresh"][name] for name in SHOWN)]
        rows.append([one["network"], *(f"{1e3 * seconds:.2f}" for seconds in cells)])
    return markdown(["network", "gradient [ms]", *(f"refresh, {name} [ms]" for name in SHOWN)], rows)


SHOWN = ("low rank, two calls", "low rank, calls by layer", "dense, one call")


def faults() -> str:
    """The state after many steps with bad batches."""
    rows = [[f"`{run['method']}`", str(run["steps"]), str(run["steps"] - run["faults"]["none"]),
             f"{run['loss'][0]:.2f}", number(run["loss"][1])] for run in recorded("faults_cpu")["runs"]]  # fmt: skip
    return markdown(["method", "steps", "bad batches", "loss before", "loss after"], rows)


def mean_ratio(name: str, size: str, step: str) -> str:
    """One number: the mean step in SGD steps."""
    content = recorded(name)
    measured = row_of(content["measured"], **{content["size"]: int(size)})
    return cell(row_of(measured["rows"], step=step)["mean ratio"])


def framework_ratio(size: str, framework: str, step: str) -> str:
    """One number: a plain step in SGD steps of its framework, by seconds of processors."""
    measured = row_of(recorded("kfac_jax_cpu")["measured"], size=size)
    return cell(row_of(measured["rows"], framework=framework, step=step)["ratio" + CLOCK], ".1f")


def systems(part: str = "systems") -> str:
    """Products of conjugate gradients to each residual, by preconditioner."""
    rows = recorded("spectra_cpu")[part]
    headings = ["preconditioner", *[f"1e-{k}" for k in range(1, 7)]]
    return markdown(headings, [[row["preconditioner"], *(cell(n, "d") for n in row["reached"])] for row in rows])


PHYSICS = {"flow": "sample space, flow", "line-search": "sample space, line search",
           "lbfgs": "L-BFGS, strong Wolfe", "adam": "Adam, rate {rate:g}"}  # fmt: skip


def physics() -> str:
    """Of each network and method the best run: errors after 40 seconds and at the end, and seconds to two bounds."""
    rows = []
    for run in best(recorded("physics_cpu")["runs"]):
        pairs = list(zip(run["error"], run["seconds"], strict=True))
        early = [error for error, second in pairs if second <= 41]
        first = [next((s for e, s in pairs if e <= bound), None) for bound in (1e-5, 1e-7)]
        errors, seconds = (early[-1], run["error"][-1]), (run["seconds"][-1], *first)
        rows.append([run["network"], PHYSICS[run["method"]].format(**run), *[cell(x, ".1e") for x in errors],
                     *[cell(x, ".0f") for x in seconds]])  # fmt: skip
    return markdown(
        ["network", "method", "error after 40 s", "at the end", "after [s]", "s to 1e-5", "s to 1e-7"], rows
    )


def spectrum() -> str:
    """Seconds of the processor for the spectrum of a ResNet-18."""
    return cell(recorded("spectra_cpu")["spectrum"]["processor seconds"], ".0f")


def example_table(name: str, *headings: str) -> str:
    """Columns of the table that an example has written, the first of them and those with the headings."""
    content = recorded(f"example_{name}")
    picked = [0, *[content["headings"].index(heading) for heading in headings]]
    names = [content["headings"][i] for i in picked]
    return markdown(names, [[row[i].replace("-", "−", row[i][0] == "-") for i in picked] for row in content["rows"]])


def example_range(name: str, heading: str) -> str:
    """The least and the largest number of such a column."""
    content = recorded(f"example_{name}")
    cells = sorted((row[content["headings"].index(heading)] for row in content["rows"]), key=float)
    return f"{cells[0]} to {cells[-1]}"


def example_caption(name: str) -> str:
    return recorded(f"example_{name}")["caption"]


FIGURES: dict[str, Callable[..., str]] = {
    "widths": widths, "costs": costs, "steps": steps, "refreshes": refreshes, "depth": depth, "compiling": compiling,
    "memory": memory, "structures": structures, "changes": changes, "frameworks": frameworks, "sent": sent,
    "modelled": modelled, "faults": faults, "mean_ratio": mean_ratio, "framework_ratio": framework_ratio,
    "systems": systems, "physics": physics, "spectrum": spectrum, "example_table": example_table,
    "example_range": example_range, "example_caption": example_caption,
}  # fmt: skip
