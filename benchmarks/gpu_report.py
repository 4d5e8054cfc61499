"""What a part of ``benchmarks.gpu`` finds, written as it goes, so that a part that is stopped leaves what it had."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import write_json


class Report:
    """Tables, notes and raw figures of one part, and the time of ``time.monotonic`` at which it ends."""

    def __init__(self, path: Path, end: float) -> None:
        self.path, self.end = path, end
        self.content: dict[str, Any] = {"tables": [], "notes": [], "measured": {}}
        self.write()

    def write(self) -> None:
        write_json(self.path, self.content)

    def note(self, text: str) -> None:
        self.content["notes"].append(text)
        self.write()

    def table(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], measured: Any) -> None:
        """Replaces the table of this title, which grows."""
        tables = [one for one in self.content["tables"] if one["title"] != title]
        one = {"title": title, "headings": list(headings), "rows": [list(row) for row in rows]}
        self.content["tables"], self.content["measured"][title] = [*tables, one], measured
        self.write()

    def has_time_for(self, what: str, seconds: float = 0.0) -> bool:
        """Whether so many seconds are left; says what is left out if not."""
        if time.monotonic() + seconds < self.end:
            return True
        self.note(f"left out, for want of time: {what}")
        return False

    def failed(self, what: str, error: BaseException) -> None:
        """Says what did not work, and why."""
        self.note(f"{what}: {type(error).__name__}: {error}".splitlines()[0][:300])
