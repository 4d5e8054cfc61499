"""What stands somewhere within nested states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def nested(state: Any, kind: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all instances of a kind within a state of tuples and dictionaries, each with its path."""
    if isinstance(state, kind):
        yield path, state
    named = state._asdict() if hasattr(state, "_asdict") else state
    parts = named.items() if isinstance(named, dict) else enumerate(named) if isinstance(named, tuple | list) else ()
    for name, part in parts:
        yield from nested(part, kind, f"{path}.{name}" if path else str(name))
