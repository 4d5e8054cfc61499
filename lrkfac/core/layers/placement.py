"""Where the examples of a batch are among the rows of a layer's tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BatchAxis(NamedTuple):
    """The place of the examples in a tensor: along one axis, alone or folded together with positions.

    Entry ``r`` of the axis belongs to example ``(r // inner) % N``: ``outer`` positions stand before the examples, as
    in ``[T, N, d]`` flattened to ``[T N, d]``, or ``inner`` after them, as in ``[N, T, d]`` flattened to ``[N T, d]``.

    Attributes:
        axis: The axis.
        outer: Number of positions in front of the examples; another one is taken where ``inner`` is 1.
        inner: Number of positions behind the examples; another one is taken where ``outer`` is 1.
        shared: Whether the axis, the leading one, has one entry for all examples.
        own: Whether these are the examples of one head of several that have different numbers of them: as many as the
            axis has entries.
    """

    axis: int = 0
    outer: int = 1
    inner: int = 1
    shared: bool = False
    own: bool = False

    def in_front(self, x: Tensor, examples: int, leading: int = 0) -> Tensor:
        """Return a tensor with the examples as the axis ``leading``, followed by what stood around them.

        Args:
            x: The tensor; its first ``leading`` axes are no part of what ``axis`` counts.
            examples: Number of examples ``N``.
            leading: Number of axes that stay in front.

        Raises:
            PlacementError: If the axis cannot hold that many examples so.
        """
        if self.shared:
            return x
        axis = leading + self.axis
        outer, inner = self._positions(x.shape[axis], x.shape[axis] if self.own else examples)
        if outer * inner > 1:
            sizes = [outer] * (outer > 1) + [examples] + [inner] * (inner > 1)
            x, axis = x.unflatten(axis, sizes), axis + (outer > 1)
        return x.movedim(axis, leading) if axis != leading else x

    def _positions(self, length: int, examples: int) -> tuple[int, int]:
        if self.outer == self.inner == 1:
            outer, inner = 1, 1
        elif self.inner == 1:
            outer, inner = length // examples, 1
        elif self.outer == 1:
            outer, inner = 1, length // examples
        else:
            outer, inner = self.outer, self.inner
        if outer * examples * inner != length:
            before = "" if self.outer == 1 else f"{self.outer} x "
            after = "" if self.inner == 1 else f" x {self.inner}"
            raise PlacementError(
                f"expected an axis of length {before}{examples}{after} for {examples} examples, got {length}; "
                "describe the layers again with find_layers() for inputs like these"
            )
        return outer, inner


class PlacementError(ValueError):
    """Raised where the rows of a layer do not fit the number of examples."""


Placement = tuple[BatchAxis, BatchAxis]
"""The places of the examples in input and output of one use of a weight, of their rows where the kind arranges them."""

IN_FRONT: Placement = (BatchAxis(), BatchAxis())
"""The batch as the leading axis of both."""
