"""Tables and numbers as plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """Return rows as aligned lines, the first of them as heading; ``right`` aligns all columns but the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [x.rjust(w) if right and i else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def few(names: Sequence[str], most: int = 4) -> str:
    """Return the first names as a list, and the number of the others."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{list(names[:most])}{rest}"


def short(number: float) -> str:
    """Return a number with three digits and a unit prefix, such as ``1.23 M``."""
    powers = min(int(math.log10(number) / 3 + 1e-4), 5) if number >= 1 else 0
    return f"{number / 1000**powers:.3g} {' kMGTP'[powers]}".rstrip()
