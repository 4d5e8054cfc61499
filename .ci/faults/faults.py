"""Whether the tests notice faults: each of a list is put into a copy of the package, and tests are run.

``python .ci/faults/faults.py --root DIR [--only ID ...] [--json OUT]`` needs nothing but the standard library, and an
environment in which ``python -m pytest`` runs the tests of ``DIR``. The list is ``faults.toml`` beside this file. A
fault is found by its text, wherever in the package that stands, and its tests by their names, so that both may move; a
fault whose text is gone, or stands there twice, counts as not found, not as caught.

For each fault the tests that are named with it come first, then their folders, then all; tests that are marked ``slow``
are left out everywhere. It is caught as soon as one fails. Before any fault, the named tests must pass without one.
Results are written after each fault; what stands in the file already is not run again.

All tests take long. With ``--together`` they are run once, with all faults that the named tests let pass, and for each
of these the files that then fail are run with it alone: as good, unless one fault hides another.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_list import Fault, applied, faults_of, place

STAGES = ("named", "folders", "all")
"""Which tests are run, one set after another until one fails."""
SECONDS = {"named": 900, "folders": 1800, "all": 3600}
"""After so long a set of tests is stopped, and counts as failed: the tests hang, which nobody overlooks."""
OPTIONS = ("-x", "-q", "-n0", "-p", "no:cacheprovider", "-m", "not slow", "--hypothesis-seed=0")
UNCHANGED = "(unchanged)"
"""Stands in the results for the package without a fault."""


@dataclass(frozen=True)
class Outcome:
    """What a run of pytest says: whether something failed, which tests, and how long it took."""

    failed: bool
    tests: tuple[str, ...]
    seconds: float
    output: str


def run_tests(root: Path, arguments: Sequence[str], limit: float) -> Outcome:
    """Runs pytest until the first failure, in a process of its own, which is stopped after ``limit`` seconds.

    Raises:
        RuntimeError: If pytest could not be run as asked.
    """
    # What an example of hypothesis is depends on the seed alone, and nothing is replayed from a run before.
    shutil.rmtree(root / ".hypothesis", ignore_errors=True)
    own = {"PYTHONPATH": str(root), "PYTEST_ADDOPTS": "", "HYPOTHESIS_PROFILE": "dev"}
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **own}
    command = [sys.executable, "-m", "pytest", *OPTIONS, *arguments]
    started = time.monotonic()
    with subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return Outcome(True, (f"stopped after {limit:.0f} s",), time.monotonic() - started, "")
    seconds = time.monotonic() - started
    names = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, flags=re.MULTILINE)
    if process.returncode in (0, 5):  # 5: no test was chosen
        return Outcome(False, (), seconds, output)
    if process.returncode == 4 and "while loading conftest" not in output:
        raise RuntimeError(f"{shlex.join(command)}:\n{output[-2000:]}")
    return Outcome(True, tuple(names or [f"exit code {process.returncode}"]), seconds, output)


def calls_of(root: Path, tests: Sequence[str]) -> list[list[str]]:
    """Calls of pytest for the tests of a fault: files together in one, each file with ``-k`` in one of its own."""
    calls: list[list[str]] = []
    for test in tests:
        path, *options = shlex.split(test)
        file = _test_file(root, path)
        if file is None:
            continue
        if calls and not options and "-k" not in calls[-1]:
            calls[-1].append(file)
        else:
            calls.append([file, *options])
    return calls


def files_of(calls: Sequence[Sequence[str]], whole: bool) -> list[str]:
    """The files in calls of pytest; only those that are run ``whole``, or those that are run in part, too."""
    found = [call[:1] if "-k" in call else call for call in calls if not (whole and "-k" in call)]
    return list(dict.fromkeys(file for files in found for file in files))


def stages(root: Path, fault: Fault, last: str) -> Iterator[tuple[str, list[str]]]:
    """The calls of pytest for a fault, with the name of the stage; what has run as a whole is left out later on."""
    calls = calls_of(root, fault.tests)
    for call in calls:
        yield "named", call
    done = files_of(calls, whole=True)
    folders = sorted({str(Path(file).parent) for file in files_of(calls, whole=False)} - {"tests"})
    if folders and last != "named":
        yield "folders", [*folders, *[f"--ignore={file}" for file in done]]
    if last == "all":
        yield "all", ["tests", *[f"--ignore={path}" for path in (*folders, *done)]]


def examined(root: Path, fault: Fault, last: str, calls: Iterable[tuple[str, list[str]]]) -> dict[str, Any]:
    """What becomes of one fault by these calls of pytest, up to the stage ``last``."""
    result: dict[str, Any] = {"id": fault.id, "wrong": fault.wrong, "digest": fault.digest, "until": last}
    found = place(fault, root / "lrkfac")
    if isinstance(found, str):
        return {**result, "status": found, "stage": "", "tests": [], "seconds": 0.0}
    result["file"] = str(found[0].relative_to(root))
    seconds = 0.0
    with applied(*found):
        for stage, arguments in calls:
            outcome = run_tests(root, arguments, SECONDS[stage])
            seconds += outcome.seconds
            if outcome.failed:
                tests = list(outcome.tests)
                return {**result, "status": "caught", "stage": stage, "tests": tests, "seconds": round(seconds, 1)}
    return {**result, "status": "survived", "stage": last, "tests": [], "seconds": round(seconds, 1)}


def files_that_fail(root: Path, faults: Sequence[Fault]) -> tuple[list[str], float]:
    """The files in which a test fails with all these faults at once, and the seconds that took.

    Raises:
        RuntimeError: If the tests hang, or two faults change the same text.
    """
    with ExitStack() as stack:
        for fault in faults:
            found = place(fault, root / "lrkfac")
            if isinstance(found, str):
                raise RuntimeError(f"{fault.id}: {found}, beside the others")
            stack.enter_context(applied(*found))
        outcome = run_tests(root, ["--maxfail=0", "tests"], SECONDS["all"])
    files = sorted({name.partition("::")[0] for name in outcome.tests})
    if not all((root / file).exists() for file in files):
        raise RuntimeError(f"all together: {', '.join(outcome.tests)}")
    return files, outcome.seconds


def unchanged(root: Path, faults: Sequence[Fault]) -> dict[str, Any]:
    """What the tests that are named with faults say without any.

    Raises:
        RuntimeError: If one fails, which would then seem to catch everything.
    """
    files = files_of([call for fault in faults for call in calls_of(root, fault.tests)], whole=False)
    outcome = run_tests(root, files, SECONDS["all"])
    if outcome.failed:
        raise RuntimeError(f"tests fail without a fault: {', '.join(outcome.tests)}\n{outcome.output[-3000:]}")
    seconds = round(outcome.seconds, 1)
    return {"id": UNCHANGED, "status": "passed", "stage": "named", "tests": [], "seconds": seconds, "files": files}


def is_known(result: dict[str, Any], fault: Fault, last: str) -> bool:
    """Whether a result need not be found again: of the same text, and no less was run."""
    if result.get("digest") != fault.digest:
        return False
    return result["status"] == "caught" or (
        result["status"] == "survived" and STAGES.index(result["until"]) >= STAGES.index(last)
    )


def table(results: Sequence[dict[str, Any]]) -> str:
    """A row for each fault, and how many were caught."""
    rows = [("fault", "outcome", "by", "s", "first test that failed")]
    for one in results:
        first = one["tests"][0] if one["tests"] else ""
        rows.append((one["id"], one["status"], one["stage"], f"{one['seconds']:.0f}", first))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    caught = sum(one["status"] == "caught" for one in results)
    minutes = sum(one["seconds"] for one in results) / 60
    return "\n".join([*lines, "", f"caught {caught} of {len(results)}, in {minutes:.0f} min"])


def _test_file(root: Path, path: str) -> str | None:
    """Where a file of tests is: at its path, or else the only one of its name."""
    if (root / path).exists():
        return path
    there = sorted(root.joinpath("tests").rglob(Path(path).name))
    return str(there[0].relative_to(root)) if len(there) == 1 else None


def _write(path: Path, results: dict[str, dict[str, Any]]) -> None:
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(list(results.values()), indent=1) + "\n", encoding="utf-8")
    os.replace(written, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; 0 where every fault was caught."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="a checkout, which is copied and not changed")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these faults alone")
    parser.add_argument("--json", type=Path, metavar="OUT", help="results; those that are there are kept")
    parser.add_argument("--until", choices=STAGES, default="all", help="run no more tests than these")
    parser.add_argument("--together", action="store_true", help="all tests once, with all faults that are left")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without a fault first")
    parser.add_argument("--list", type=Path, default=Path(__file__).with_name("faults.toml"), help="the faults")
    given = parser.parse_args(arguments)
    faults = faults_of(given.list)
    if given.only:
        unknown = set(given.only) - {fault.id for fault in faults}
        if unknown:
            parser.error(f"--only: no faults {sorted(unknown)}")
        faults = [fault for fault in faults if fault.id in given.only]
    there = json.loads(given.json.read_text(encoding="utf-8")) if given.json and given.json.exists() else []
    results = {one["id"]: one for one in there}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        root = Path(folder, "root").resolve()
        shutil.copytree(given.root, root, symlinks=True, ignore=shutil.ignore_patterns(".git", ".hypothesis"))

        def note(one: dict[str, Any]) -> None:
            results[one["id"]] = one
            words = f"{one['id']}: {one['status']} {one['stage']}, {one['seconds']:.0f} s"
            print(words, *one["tests"][:1], flush=True)
            if given.json:
                _write(given.json, results)

        if not given.trust and UNCHANGED not in results:
            note(unchanged(root, faults))
        last = "named" if given.together else given.until
        for fault in faults:
            if not is_known(results.get(fault.id, {}), fault, last):
                note(examined(root, fault, last, stages(root, fault, last)))
        left = [fault for fault in faults if given.together and not is_known(results[fault.id], fault, "all")]
        left = [fault for fault in left if results[fault.id]["status"] == "survived"]
        if left:
            files, seconds = files_that_fail(root, left)
            print(f"(together): {seconds:.0f} s, failures in {', '.join(files) or 'no file'}", flush=True)
            for fault in left:
                note(examined(root, fault, "all", [("all", [file]) for file in files]))
    chosen = [results[fault.id] for fault in faults]
    print(table(chosen))
    return int(any(one["status"] != "caught" for one in chosen))


if __name__ == "__main__":
    sys.exit(main())
