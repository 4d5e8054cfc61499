"""The list of faults, and their places in the package, by their text, however that is broken into lines."""

from __future__ import annotations

import hashlib
import re
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        id: A short name.
        wrong: What is wrong, in a sentence.
        tests: Arguments of pytest, each a string: files in which a test should fail, the likeliest first, with or
            without ``-k``.
        wordings: Pairs ``(old, new)`` of source text; the first whose old text is found is used, however it is
            broken into lines.
    """

    id: str
    wrong: str
    tests: tuple[str, ...]
    wordings: tuple[tuple[str, str], ...]

    @property
    def digest(self) -> str:
        """Changes with the fault's text and tests."""
        return hashlib.sha256(repr((self.wordings, self.tests)).encode()).hexdigest()[:12]


def faults_of(path: Path) -> list[Fault]:
    """The list in a file.

    Raises:
        ValueError: If an id stands there twice, a fault has no tests, or its texts do not differ.
    """
    found = []
    for one in tomllib.loads(path.read_text(encoding="utf-8"))["fault"]:
        others = [(other["old"], other["new"]) for other in one.get("otherwise", ())]
        wordings = tuple((old.strip(), new.strip()) for old, new in [(one["old"], one["new"]), *others])
        found.append(Fault(one["id"], one["wrong"], tuple(one["tests"]), wordings))
    often = Counter(fault.id for fault in found)
    for fault in found:
        if often[fault.id] > 1 or not fault.tests or any(not old or old == new for old, new in fault.wordings):
            raise ValueError(f"{fault.id}: expected an id of its own, tests, and two texts that differ")
    return found


def place(fault: Fault, package: Path) -> tuple[Path, str] | str:
    """The file that a fault changes and its text with the fault, or why there is none."""
    reason = "not found"
    for old, new in fault.wordings:
        pattern, longest = _pattern(old), max(re.findall(r"\w+", old), key=len, default="")
        sources = [(path, text) for path, text in _sources(package) if longest in text]
        found = [(path, match) for path, text in sources for match in pattern.finditer(text)]
        if len(found) == 1:
            ((path, match),) = found
            text = path.read_text(encoding="utf-8")
            start = text.rfind("\n", 0, match.start()) + 1
            indent = re.match(r"[ \t]*", text[start:])[0]
            changed = text[: match.start()] + new.replace("\n", "\n" + indent) + text[match.end() :]
            compile(changed, str(path), "exec")  # a fault is one of meaning
            return path, changed
        if found:
            reason = f"found {len(found)} times"
    return reason


@contextmanager
def applied(path: Path, changed: str) -> Iterator[None]:
    """The file with another text, for a while."""
    before = path.read_text(encoding="utf-8")
    path.write_text(changed, encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")
        shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)


def _pattern(text: str) -> re.Pattern[str]:
    """Matches source text however it is broken into lines, and no part of a longer name."""
    found = ""
    for token in re.findall(r"\w+|[^\w\s]", text):
        between = r"\s+" if found[-1:].isalnum() and token[0].isalnum() else r"\s*"
        found += (between if found else "") + re.escape(token)
    before, after = (r"(?<!\w)" if re.match(r"\w", text) else ""), (r"(?!\w)" if re.search(r"\w$", text) else "")
    return re.compile(before + found + after)


def _sources(package: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(package.rglob("*.py")):
        yield path, path.read_text(encoding="utf-8")
