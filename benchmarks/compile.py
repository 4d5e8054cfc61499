"""What compiling a step costs and brings, by what is compiled; each way in a process of its own with an empty cache.

python -m benchmarks.compile
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import lrkfac
from benchmarks.common import (
    argument_parser,
    command_of,
    environment,
    interleaved,
    median_ratios,
    printed_by_child,
    results_table,
    wide_console,
    write_json,
    written,
)
from benchmarks.networks import perceptron

MODULE = "benchmarks.compile"
RATE = 0.1
PLAIN, REFRESH = "plain", "refresh"
STEPS = {PLAIN: False, REFRESH: True}

Step = Callable[..., Any]
"""``(params, state, inputs, targets, statistics) -> (params, state)``."""


def whole(evaluate: Any, tx: Any, options: dict[str, Any] | None = None) -> Step:
    """Forward and backward pass and update in one graph, two in all."""
    return torch.compile(partial(step_of, evaluate, tx.update), fullgraph=True, dynamic=False, options=options)


def apart(evaluate: Any, tx: Any) -> Step:
    """Evaluation and update, each in graphs of its own."""
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    return partial(step_of, compiled(evaluate), compiled(tx.update))


def evaluation_alone(evaluate: Any, tx: Any) -> Step:
    """The model with its derivatives, and an eager update."""
    return partial(step_of, torch.compile(evaluate, fullgraph=True, dynamic=False), tx.update)


def without_statistics(evaluate: Any, tx: Any) -> Step:
    """Steps between two refreshes, and eager refreshes."""
    eager, compiled = partial(step_of, evaluate, tx.update), whole(evaluate, tx)
    return lambda *batch: (eager if batch[-1] else compiled)(*batch)


WAYS: dict[str, Callable[[Any, Any], Step]] = {
    "eager": lambda evaluate, tx: partial(step_of, evaluate, tx.update),
    "whole step": whole,
    "whole step, cpp_wrapper": partial(whole, options={"cpp_wrapper": True}),
    "evaluate and update apart": apart,
    "evaluate alone": evaluation_alone,
    "plain steps alone": without_statistics,
}
CHAINS: dict[str, Callable[..., Any]] = {
    "low_rank_kfac": lambda layers, rank: lrkfac.low_rank_kfac(layers, RATE, rank=rank),
    "adaptive_low_rank_kfac": lambda layers, rank: lrkfac.adaptive_low_rank_kfac(layers, rank=rank),
}


def step_of(
    evaluate: Any, update: Any, params: Any, state: Any, inputs: Any, targets: Any, statistics: bool
) -> tuple[Any, Any]:
    """One step of a chain."""
    evaluation = evaluate(params, inputs, targets, statistics=statistics)
    updates, state = update(evaluation.grads, state, params, evaluation=evaluation)
    return lrkfac.apply_updates(params, updates), state


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for, such as the C++ compiler."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measured(way: str, chain: str, depth: int, width: int, batch_size: int, rank: int, repeats: int) -> dict[str, Any]:
    """CPU seconds of the first call with and without statistics, and the time of later ones beside eager ones."""
    work = perceptron(width, batch_size, torch.device("cpu"), depth - 1)
    model, params = lrkfac.from_module(work.module)
    params = {name: p.detach() for name, p in params.items()}
    layers = lrkfac.find_layers(model, params, work.inputs)
    evaluate, tx = lrkfac.evaluator(model, lrkfac.categorical(), layers), CHAINS[chain](layers, rank)
    eager, step = WAYS["eager"](evaluate, tx), WAYS[way](evaluate, tx)
    batch, state, first = (work.inputs, work.targets), tx.init(params), {}
    eager(params, state, *batch, True)
    for name in (REFRESH, PLAIN):
        before = cpu_seconds()
        params, state = step(params, state, *batch, STEPS[name])
        first[name] = cpu_seconds() - before
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if way != "eager" else 0
    ratios = {}
    for name, flag in STEPS.items():
        both = {kind: partial(one, params, state, *batch, flag) for kind, one in (("eager", eager), ("compiled", step))}
        seconds = interleaved(both, torch.device("cpu"), repeats)
        ratios[name] = median_ratios(seconds, "eager")["compiled"]
        first[f"{name} step"] = statistics.median(seconds["compiled"])
    return {"way": way, "chain": chain, "depth": depth, "seconds": first, "ratios": ratios, "graphs": graphs}


def in_child(threads: int, **options: Any) -> dict[str, Any]:
    """The same in a process of its own, with an empty cache of compiled code."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        found: dict[str, Any] = json.loads(printed_by_child(MODULE, "--child", json.dumps(options), str(threads)))
    return found


def row(one: dict[str, Any]) -> list[str]:
    """One line of the table."""
    seconds, ratios = one["seconds"], one["ratios"]
    firsts = [seconds[REFRESH], seconds[PLAIN], seconds[REFRESH] + seconds[PLAIN]]
    return [
        one["way"], one["chain"], str(one["depth"]), str(one["graphs"]), *(f"{x:.1f}" for x in firsts),
        *(f"{1e3 * seconds[f'{name} step']:.2f}" for name in STEPS), *(f"{ratios[name]:.2f}" for name in STEPS),
    ]  # fmt: skip


def main() -> None:
    """Runs the benchmark."""
    if sys.argv[1:2] == ["--child"]:
        torch.set_num_threads(int(sys.argv[3]))
        print(json.dumps(measured(**json.loads(sys.argv[2]))))
        return
    parser = argument_parser(MODULE, __doc__)
    add = parser.add_argument
    add("--depths", type=int, nargs="+", default=[8], metavar="L", help="numbers of layers")
    add("--width", type=int, default=256, metavar="D", help="of the hidden layers")
    add("--batch-size", type=int, default=128, metavar="N", help="examples per batch")
    add("--rank", type=int, default=32, metavar="R", help="of the factors")
    add("--repeats", type=int, default=21, metavar="N", help="timings of each step")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=f"of {', '.join(WAYS)}")
    add("--chains", nargs="+", choices=CHAINS, default=list(CHAINS)[:1], metavar="CHAIN", help=f"of {list(CHAINS)}")
    arguments = parser.parse_args()
    described = environment(arguments.threads, torch.device("cpu")) | command_of(MODULE, vars(arguments))
    console, found = wide_console(), []
    options = {name: getattr(arguments, name) for name in ("width", "batch_size", "rank", "repeats")}
    for depth in arguments.depths:
        for chain in arguments.chains:
            for way in arguments.ways:
                with console.status(f"{way}, {chain}, {depth} layers"):
                    found.append(in_child(arguments.threads, way=way, chain=chain, depth=depth, **options))
                write_json(arguments.output / "compile_cpu.json", {"environment": described, "ways": found})
    title = f"Width {arguments.width}, batch {arguments.batch_size}, rank {arguments.rank}, float32"
    headings = ["compiled", "chain", "layers", "graphs", "first_refresh [CPU s]", "first_plain [CPU s]", "both [CPU s]"]
    headings += ["plain [ms]", "refresh [ms]", "plain /eager", "refresh /eager"]
    console.print(results_table(title, headings, [row(one) for one in found]))
    console.print(described)
    written(arguments.output / "compile_cpu.json", console)


if __name__ == "__main__":
    main()
