"""Numbers that describe an average and its damped inverse: eigenvalues, captured trace, effective dimension."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

SIDES = ("B", "A")
"""Names of the factors of a product, in the order in which states hold them."""


WHOLE = "F"
"""Name of the block itself."""


class Spectrum(NamedTuple):
    """Eigenvalues of a matrix ``M``.

    Attributes:
        eigenvalues: Of the eigenpairs in the state, ``[r]``, largest first; of all, where it has ``M`` itself.
        rest: The trace that these leave out, ``[]``.
    """

    eigenvalues: Tensor
    rest: Tensor


class Damped(NamedTuple):
    """Numbers of ``M`` with its damping ``δ``, ``[]`` each.

    Attributes:
        effective: The effective dimension ``tr(M (M + δ I)⁻¹)``.
        largest: Upper bound of the eigenvalues of ``M + δ I``, as it was inverted; the largest one, but for
            ``low_rank_plus_diagonal``.
        smallest: Lower bound of them, likewise.
    """

    effective: Tensor
    largest: Tensor
    smallest: Tensor


class Part(NamedTuple):
    """A matrix within a block that ``diagnose`` describes.

    Attributes:
        name: ``"A"``, ``"B"`` or ``"F"``.
        state: Its state.
        inverse: Its damped inverse, or ``None`` where the block has none of this part alone.
        damping: The damping in that inverse.
    """

    name: str
    state: Any
    inverse: Any = None
    damping: Any = None


def spectrum_of(eigenvalues: Tensor, rest: Tensor) -> Spectrum:
    """Return the spectrum with eigenvalues sorted, and rounding below 0 cut off."""
    return Spectrum(eigenvalues.clamp(min=0).sort(descending=True).values, rest.clamp(min=0))


def damped_of(groups: list[tuple[Tensor, Tensor, int]]) -> Damped:
    """Return the damped numbers of a matrix from eigenvalues, the same damped, and how often they occur."""
    effective = torch.stack([(values / shifted).sum() * often for values, shifted, often in groups]).sum()
    every = torch.cat([shifted for _, shifted, _ in groups])
    return Damped(effective, every.amax(), every.amin())


def damped(state: Any, inverse: Any, damping: Tensor, eigenvalues: Tensor) -> Damped:
    """Return the damped numbers of a state: by its method ``damped``, or else from its eigenvalues."""
    if hasattr(state, "damped"):
        numbers: Damped = state.damped(inverse, damping, eigenvalues)
        return numbers
    return damped_of([(eigenvalues, eigenvalues + damping, 1)])


def squared_distance(state: Any, other: Any) -> tuple[Tensor, Tensor]:
    """Return ``‖M - N‖²`` and ``‖M‖²`` in Frobenius norm, ``[]`` each, of the averages of two states of one form."""
    size = state.inner(state)
    if hasattr(state, "squared_distance"):
        return state.squared_distance(other), size
    return (size - 2 * state.inner(other) + other.inner(other)).clamp(min=0), size
