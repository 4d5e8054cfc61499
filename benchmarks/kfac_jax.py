"""Time of training steps of kfac-jax and of lrkfac, each beside an SGD step of its own framework, by width.

python -m benchmarks.kfac_jax
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.common import (
    argument_parser,
    command_of,
    environment,
    save_figure,
    wide_console,
    write_json,
    write_results,
)
from benchmarks.kfac_jax_report import CLOCKS, draw, report, rows_of
from benchmarks.kfac_jax_rounds import COMPILED, DIGITS, EAGER, JAX
from benchmarks.kfac_jax_rounds import MODULE as CHILD

MODULE = "benchmarks.kfac_jax"
PACKAGES = ("jax", "jaxlib", "kfac-jax", "asdfghjkl", "curvlinops-for-pytorch")
INSTALL = "pip install jax git+https://github.com/google-deepmind/kfac-jax"
MISSING = "" if find_spec("jax") and find_spec("kfac_jax") else f"needs jax and kfac-jax: {INSTALL}"


class Child:
    """A process that trains in one framework, and waits between rounds."""

    def __init__(self, framework: str, size: str, arguments: Namespace) -> None:
        settings = {"framework": framework, "size": size, **{
            name: getattr(arguments, name) for name in ("batch_size", "rank", "every", "device", "threads")
        }}  # fmt: skip
        # So that code is made in this process and its children, whose processors' time counts, and never found.
        variables = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        variables["NPROC"] = str(arguments.threads)  # for XLA, which takes all processors otherwise
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", CHILD, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, env={**os.environ, **variables},
        )  # fmt: skip

    def round(self) -> dict[str, Any]:
        """Has it train to the next refresh."""
        print(file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"the process stopped with code {self._process.wait()}: {self._errors.read()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        """Lets it end."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def measured(size: str, arguments: Namespace) -> dict[str, Any]:
    """The rows of each framework, whose processes take rounds in turn, one at a time; wide networks take fewer."""
    frameworks = [JAX, EAGER, *([COMPILED] if size in arguments.compile else [])]
    repeats = arguments.repeats if size == DIGITS else max(2, arguments.repeats * 512 // max(512, int(size)))
    children: dict[str, Child] = {}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in frameworks}
    try:
        children |= {name: Child(name, size, arguments) for name in frameworks}
        order = list(frameworks)
        for _ in range(1 + repeats):
            for name in order:
                answers[name].append(children[name].round())
            order = order[1:] + order[:1]
    finally:
        for child in children.values():
            child.close()
    rows = [row for name in frameworks for row in rows_of(name, answers[name])]
    return {"size": size, "rows": rows, "missing": answers[EAGER][0]["missing"]}


def settings_of(arguments: Namespace) -> dict[str, Any]:
    """What is measured, rather than printed."""
    return {name: value for name, value in vars(arguments).items() if name not in ("clock", "report")}


def commit(package: str) -> str:
    """Which commit is installed, where that is known: a repository may call itself by the version last released."""
    try:
        text = distribution(package).read_text("direct_url.json")
    except PackageNotFoundError:
        text = None
    return json.loads(text or "{}").get("vcs_info", {}).get("commit_id", "unknown")


def main() -> None:
    """Runs the benchmark."""
    parser = argument_parser(MODULE, __doc__)
    add = parser.add_argument
    sizes = ["512", "1024", "2048", DIGITS]
    add("--sizes", nargs="+", default=sizes, metavar="D", help="widths of the hidden layers, or digits")
    add("--batch-size", type=int, default=128, metavar="N", help="examples per batch of a perceptron")
    add("--rank", type=int, default=32, metavar="R", help="of our factors")
    add("--every", type=int, default=10, metavar="K", help="steps per refresh")
    add("--repeats", type=int, default=5, metavar="N", help="rounds of so many steps that are timed up to width 512")
    add("--compile", nargs="+", default=[], metavar="D", help="of the sizes, those with our steps compiled as well")
    add("--clock", choices=CLOCKS, default="wall", help="what is printed; other work disturbs cpu less, of one thread")
    add("--report", action="store_true", help="print what the last run has measured")
    arguments = parser.parse_args()
    console = wide_console()
    path = arguments.output / f"kfac_jax_{arguments.device}.json"
    if arguments.report:
        content = json.loads(path.read_text())
        report(content, arguments.clock, console)
        save_figure(path.with_suffix(".png"), draw(content["measured"], arguments.clock), console)
        return
    for size in arguments.sizes:
        if size != DIGITS and not size.isdecimal():
            parser.error(f"--sizes: expected widths or {DIGITS}, got {size}")
    if MISSING:
        sys.exit(MISSING)
    device = torch.device(arguments.device)
    described = environment(arguments.threads, device, PACKAGES) | command_of(MODULE, settings_of(arguments))
    described["commit of kfac-jax"] = commit("kfac-jax")
    found: list[dict[str, Any]] = []
    content = {"environment": described, "measured": found}
    for size in arguments.sizes:
        with console.status(f"measuring {size}"):
            found.append(measured(size, arguments))
        write_json(path, content)  # what there is, should the rest be interrupted
    report(content, arguments.clock, console)
    write_results(path, content, draw(found, arguments.clock), console)


if __name__ == "__main__":
    main()
