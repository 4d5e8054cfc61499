"""Derivatives of a network by its inputs, as models whose layers the capture sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lrkfac.core.base.arguments import check_model, check_values
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.jet_functions import Jets
from lrkfac.core.layers.jets import Jet, Pairs, Plan, Traced, is_jet, lifted, lowered

Network = Callable[[Tree, Tensor], Tensor]
"""From parameters and points ``[N, d]`` to ``[N, ...]``."""


class Derivatives(NamedTuple):
    """A network's value and derivatives at some points; those by coordinates are the last axis.

    Attributes:
        value: What the network returns, ``[N, ...]``.
        gradient: Its first derivatives by all coordinates, ``[N, ..., d]``.
        second: The second derivatives that were chosen, in their order, ``[N, ..., m]``.
    """

    value: Tensor
    gradient: Tensor
    second: Tensor


@dataclass(frozen=True)
class _Laplacian:
    """The function that ``laplacian`` returns."""

    network: Network

    def __call__(self, params: Tree, points: Tensor) -> Tensor:
        d = _coordinates(points)
        return _rows(self.network, params, points, Plan(d, (tuple([(i, i) for i in range(d)]),)))[-1]


@dataclass(frozen=True)
class _DerivativesOf:
    """The function that ``derivatives`` returns."""

    network: Network
    second: tuple[Pairs, ...]

    def __call__(self, params: Tree, points: Tensor) -> Derivatives:
        d = _coordinates(points)
        largest = max([i for pairs in self.second for pair in pairs for i in pair], default=-1)
        if largest >= d:
            raise ValueError(
                f"second: expected coordinates below {d} for points of shape {tuple(points.shape)}, got {largest}"
            )
        rows = _rows(self.network, params, points, Plan(d, self.second)).movedim(0, -1)
        return Derivatives(rows[..., 0], rows[..., 1 : d + 1], rows[..., d + 1 :])


def laplacian(network: Network) -> Network:
    """Return the Laplacian of a network by its inputs, ``Δf = Σᵢ ∂²f / ∂xᵢ²``, as a model.

    Value, first derivatives and Laplacian go through the network together, as ``d + 2`` rows for each point. So each
    weight is one layer, which ``find_layers`` sees, and a bias belongs to it with the constant input ``(1, 0, …, 0)``.
    The network needs no change: linear layers, elementwise functions, arithmetic, rearrangements, normalisations by
    example, products. ``derivatives`` also returns the value and single derivatives.

    Inside ``torch.compile`` write ``x.t()`` for ``x.T``, and ``x.new_zeros(n)`` for ``device=x.device``: function modes
    do not see attributes there, and tensors made by them are refused. A custom ``torch.autograd.Function`` is refused
    outside the compiler. Inside, its ``forward`` can be differentiated and its ``backward`` ignored without an error.

    Source: Dangel, Müller & Zeinhofer 2024, arXiv 2405.15603, section 3; Li et al. 2024, arXiv 2307.08214.

    Examples:
        >>> import torch
        >>> from lrkfac import find_layers, from_module, laplacian
        >>> module = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> network, params = from_module(module)
        >>> model, points = laplacian(network), torch.rand(5, 2)
        >>> model(params, points).shape
        torch.Size([5, 1])
        >>> print(find_layers(model, params, points))
        name  kind    parameters        shape  factors   uses
        ----  ------  ----------------  -----  --------  ----
        0     linear  0.weight, 0.bias  8 x 2  A 3, B 8  1
        2     linear  2.weight, 2.bias  1 x 8  A 9, B 1  1
        <BLANKLINE>
        every parameter is covered

    Args:
        network: A pure function ``network(params, points)`` of points ``[N, d]`` that returns a tensor ``[N, ...]``;
            the outputs at a point depend on no other point.

    Returns:
        A pure function ``(params, points)``, like the network; it copies and pickles where the network does.

    Raises:
        TypeError: If ``network`` is no function; in the function returned, if the points are no floating-point tensor,
            or the network returns something else than a tensor that depends on them.
        ValueError: In that function, if the network applies to what depends on the points a function of which no
            derivatives are known here, which the message names.
    """
    return _Laplacian(check_model(network, "network"))


def derivatives(
    network: Network, second: Sequence[tuple[int, int] | Sequence[tuple[int, int]]] = ()
) -> Callable[[Tree, Tensor], Derivatives]:
    """Return a network's value, gradient and chosen second derivatives by its inputs, as a function of the same kind.

    They go through the network together, see ``laplacian``. A model that is made of them has its layers covered.

    Examples:
        >>> import torch
        >>> from lrkfac import derivatives, find_layers, from_module
        >>> module = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> network, params = from_module(module)
        >>> heat = derivatives(network, second=[((1, 1), (2, 2))])  # points (t, x, y)
        >>> def residual(params, points):
        ...     u = heat(params, points)
        ...     return u.gradient[..., 0] - u.second[..., 0]  # ∂u/∂t - (∂²u/∂x² + ∂²u/∂y²)
        >>> points = torch.rand(5, 3)
        >>> residual(params, points).shape, len(find_layers(residual, params, points))
        (torch.Size([5, 1]), 2)

    Args:
        network: See ``laplacian``.
        second: For each entry of ``second`` in the result, the coordinates ``(i, j)`` of ``∂²/∂xᵢ∂xⱼ``, or several such
            pairs, whose derivatives are summed: that is one row in place of several.

    Returns:
        A pure function ``(params, points)`` that returns a NamedTuple of ``value`` ``[N, ...]``, ``gradient``
        ``[N, ..., d]`` and ``second`` ``[N, ..., m]``.

    Raises:
        TypeError: If ``network`` is no function, or ``second`` no sequence of pairs of integers; in the function
            returned, as for ``laplacian``.
        ValueError: If a coordinate is negative; in that function, if the points have no such coordinate, or as for
            ``laplacian``.
    """
    return _DerivativesOf(check_model(network, "network"), _checked(second))


def _rows(network: Network, params: Tree, points: Tensor, plan: Plan) -> Tensor:
    """Return a network's value and derivatives, ``[K, N, ...]``."""
    traced: Traced = []
    argument = lowered(traced, Jet.at(points, plan))
    with Jets(traced):
        result: Any = network(params, argument)
    result = lifted(traced, result)
    if not is_jet(result):
        raise TypeError(f"network: expected a tensor that depends on the points, got {type(result).__name__}")
    return result.rows


def _coordinates(points: Any) -> int:
    """Return the number of coordinates of points."""
    if is_jet(points):
        raise TypeError("points: expected a tensor, got derivatives: those of derivatives are not taken this way")
    if not isinstance(points, Tensor) or not points.is_floating_point():
        got = points.dtype if isinstance(points, Tensor) else type(points).__name__
        raise TypeError(f"points: expected a floating-point tensor [N, d], got {got}")
    check_values(points=points)
    if not points.ndim or not points.shape[-1]:
        raise ValueError(f"points: expected a tensor [N, d], got the shape {tuple(points.shape)}")
    return points.shape[-1]


def _checked(second: Any) -> tuple[Pairs, ...]:
    """Return the pairs of each row."""
    if not isinstance(second, Sequence) or isinstance(second, str | bytes):
        raise TypeError(f"second: expected a sequence of pairs (i, j), got {type(second).__name__}")
    rows = []
    for entry in second:
        pairs = [entry] if isinstance(entry, Sequence) and all(isinstance(i, int) for i in entry) else entry
        if not isinstance(pairs, Sequence) or not pairs or not all(_is_pair(pair) for pair in pairs):
            raise TypeError(f"second: expected a pair (i, j) of coordinates, or several, for each entry, got {entry!r}")
        if any(i < 0 for pair in pairs for i in pair):
            raise ValueError(f"second: expected coordinates counted from 0, got {entry!r}")
        rows.append(tuple([(i, j) for i, j in pairs]))
    return tuple(rows)


def _is_pair(x: Any) -> bool:
    numbers = isinstance(x, Sequence) and not isinstance(x, str | bytes) and len(x) == 2
    return numbers and all(isinstance(i, int) and not isinstance(i, bool) for i in x)
