"""Writes the figures of README and documentation: tables and numbers between two comments, from the recorded results.

python -m benchmarks.figures            # after new results
python -m benchmarks.figures --check    # names what differs, and changes nothing

A marked place is `<!-- figure: NAME ARGUMENT ... -->text<!-- end -->`, where NAME is a function of `figure_tables` or
`figure_runs`. What it returns replaces the text. A number stands within a line: at its start, a comment would end the
paragraph.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import figure_runs, figure_tables

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"<!-- figure: (?P<call>.+?) -->(?P<text>.*?)<!-- end -->", re.DOTALL)
FIGURES: dict[str, Callable[..., str]] = {**figure_runs.FIGURES, **figure_tables.FIGURES}


def pages() -> list[Path]:
    """The files with marked places."""
    return [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def figure(call: str) -> str:
    """What belongs between the comments; a table stands on lines of its own."""
    name, *arguments = shlex.split(call)
    if name not in FIGURES:
        raise ValueError(f"figure: expected one of {', '.join(FIGURES)}, got {name!r}")
    text = FIGURES[name](*arguments)
    return f"\n\n{text}\n\n" if "\n" in text else text


def filled(text: str) -> str:
    """The page with its figures as they are recorded."""
    return MARKED.sub(lambda m: f"<!-- figure: {m['call']} -->{figure(m['call'])}<!-- end -->", text)


def differences(text: str) -> list[str]:
    """The calls of the marked places that are not as recorded, with both texts."""
    found = []
    for marked in MARKED.finditer(text):
        call, old, new = marked["call"], marked["text"].strip(), figure(marked["call"]).strip()
        if "\n" not in new and text[: marked.start()].endswith("\n"):
            raise ValueError(f"figure {call}: expected a number within a line, got it at the start of one")
        if old != new:
            found.append(f"{call}: expected {new!r}, got {old!r}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the figures, or compare them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say what differs from the recorded results")
    check = parser.parse_args(arguments).check
    found = {path: differing for path in pages() if (differing := differences(path.read_text()))}
    for path, differing in found.items():
        print(*(f"{path.relative_to(ROOT)}: {one}" for one in differing), sep="\n")
        if not check:
            path.write_text(filled(path.read_text()))
    if found and check:
        sys.exit("expected the recorded figures; run: python -m benchmarks.figures")


if __name__ == "__main__":
    main()
