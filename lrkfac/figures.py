"""What all pictures share: matplotlib where it is installed, figures, axes and colours."""

from __future__ import annotations

from typing import Any

FEW = 10
"""Largest number of layers that have a colour and a name each; more are coloured by depth."""


def colours_of(number: int) -> list[Any]:
    """Return as many colours."""
    matplotlib = library()
    if number <= FEW:
        return list(matplotlib.colormaps["tab10"].colors[:number])
    return [matplotlib.colormaps["viridis"](i / (number - 1)) for i in range(number)]


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, in inches."""
    library()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def tidy(axis: Any) -> None:
    """Leave two spines and a faint grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)


def library() -> Any:
    """Return matplotlib.

    Raises:
        ImportError: Without it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "matplotlib: pictures need it, and it is not installed; python -m pip install 'lrkfac[plot]'"
        ) from error
    return matplotlib
