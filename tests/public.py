"""The public names of the package: those at the top and those of its namespaces."""

from __future__ import annotations

from typing import Any

import lrkfac

NAMESPACES = ("curvature", "linalg", "structures", "schedules", "checkpoint")


def public_names() -> list[tuple[str, Any]]:
    """Dotted names below ``lrkfac``, each with what it stands for."""
    top = [(name, getattr(lrkfac, name)) for name in lrkfac.__all__]
    spaces = [(space, getattr(lrkfac, space)) for space in NAMESPACES]
    return top + [(f"{space}.{name}", getattr(module, name)) for space, module in spaces for name in module.__all__]


def _by_short_name() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, thing in sorted(public_names(), key=lambda pair: pair[0].startswith("linalg.")):
        space, _, short = name.rpartition(".")
        found[f"{short} of {space}" if short in found else short] = thing
    return found


BY_SHORT_NAME = _by_short_name()
"""What each public name stands for, by its last part; ``"trace of linalg"`` where another has that name."""
