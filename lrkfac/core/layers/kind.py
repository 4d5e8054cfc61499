"""What a layer kind is: an operation, its transpose, and how its tensors are arranged by example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrkfac.core.layers.placement import Placement

Options = tuple[Any, ...]


def _no_groups(options: Options) -> int:
    return 1


def _last(options: Options) -> int:
    return -1


def _leading(x: Tensor, side: int, options: Options) -> tuple[Tensor, Sequence[int]]:
    return x, range(min(x.ndim, 1))


@dataclass(frozen=True)
class Kind:
    """One kind of layer, by its operation and the transpose of it.

    Attributes:
        name: As shown in the table of layers.
        prepare: ``(a, g, N, options, placement) -> (a, g)``: the standard form of the operation's input and of the
            gradients at its output, ``g`` with a leading axis ``k``. Where the placement of the examples is not known,
            ``None``, all rows are there, but not by example.
        places: ``(x, side, options) -> (x, axes)``: the input (side 0) or output (side 1) of an operation as a
            placement counts its axes, and those among which that of the batch may be; the leading one by default.
        transpose: ``(a, g, d, options) -> [k, d]`` for one group: the gradient of ``sum(g * s)`` with respect to ``W``.
        operation: ``(a, W, options) -> s`` for one group, without bias; ``W`` is ``[k, d]`` and ``s`` has ``k``
            channels. ``None`` for kinds whose blocks are no Kronecker products.
        groups: ``options -> `` number of groups.
        channel: ``options -> `` axis of the channels in ``g`` (and in ``a``, where ``groups > 1``), from the end.
        rows: ``(a, d) -> [n, d]`` where the rows need no unfolding, else ``None``.
        one_hot: Whether the rows of the weight are picked by number (``a`` holds integers): then the *output* side
            of ``W`` is one-hot and the gradients are the rows of its input side.
        unit_wise: Whether the Fisher block is small blocks, one for each output (scales and shifts), and no product.
        picks: Whether rows consist of entries of ``a``, so that the squares of rows are the rows of the squares.
    """

    name: str
    prepare: Callable[[Tensor, Tensor, int, Options, Placement | None], tuple[Tensor, Tensor]]
    transpose: Callable[[Tensor, Tensor, int, Options], Tensor]
    operation: Callable[[Tensor, Tensor, Options], Tensor] | None = None
    groups: Callable[[Options], int] = _no_groups
    channel: Callable[[Options], int] = _last
    places: Callable[[Tensor, int, Options], tuple[Tensor, Sequence[int]]] = _leading
    rows: Callable[[Tensor, int], Tensor] | None = None
    one_hot: bool = False
    unit_wise: bool = False
    picks: bool = True


def by_example(a: Tensor, g: Tensor, n: int, placement: Placement | None) -> tuple[Tensor, Tensor]:
    """Return input and gradients with the examples in front, as they are where it is not known where these are."""
    if placement is None:
        return a, g
    return placement[0].in_front(a, n), placement[1].in_front(g, n, leading=1)


def of_each(a: Tensor, g: Tensor) -> Tensor:
    """Return the input once for each example, where all share one."""
    return a.expand(g.shape[1], *a.shape[1:]) if a.shape[0] == 1 else a
