"""Jets: tensors that carry their derivatives by some points along, through an unmodified network.

A jet of ``K`` rows is a value, its first derivatives by all coordinates and some second ones, ``[K, ...]``. Where it
passes a linear layer, that is one operation on the rows of all points, so that a capture sees one layer. (Forward
Laplacian: Li et al. 2024, arXiv 2307.08214; Dangel, Müller & Zeinhofer 2024, arXiv 2405.15603, equation 8.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import resolve_name

from lrkfac.core.base.private_torch import tensor_without_values

Pairs = tuple[tuple[int, int], ...]
"""Coordinates ``(i, j)`` of second derivatives that are summed."""


class Plan(NamedTuple):
    """The derivatives that jets carry.

    Attributes:
        coordinates: The number ``d`` of coordinates, of each of which there is a first derivative.
        seconds: For each further row, the second derivatives of which it is the sum.
    """

    coordinates: int
    seconds: tuple[Pairs, ...]

    def quadratic(self, terms: Callable[[Sequence[int], Sequence[int]], Tensor]) -> Tensor:
        """Return the sum over the pairs of each second row, ``[m, ...]``.

        Args:
            terms: From the numbers ``i`` and ``j`` of all pairs to what is summed, ``[pairs, ...]``.
        """
        left, right = zip(*[pair for pairs in self.seconds for pair in pairs], strict=True)
        each = terms(left, right)
        if len(left) == len(self.seconds):
            return each
        parts = each.split([len(pairs) for pairs in self.seconds])
        return torch.cat([part.sum(dim=0, keepdim=True) for part in parts])


class Jet(Tensor):
    """A tensor without values in the place of a value and its derivatives.

    Attributes:
        rows: Value, first and second derivatives, ``[K, ...]``.
        plan: Which derivatives these are.
    """

    rows: Tensor
    plan: Plan

    @staticmethod
    def of(rows: Tensor, plan: Plan) -> Jet | TracedJet:
        """Return the jet with these rows."""
        if torch.compiler.is_compiling():
            return TracedJet(rows, plan)
        jet: Jet = tensor_without_values(Jet, rows.shape[1:], rows.dtype, rows.device)
        jet.rows, jet.plan = rows, plan
        return jet

    @staticmethod
    def constant(x: Tensor, plan: Plan) -> Jet | TracedJet:
        """Return a tensor as a jet whose derivatives are 0."""
        further = plan.coordinates + len(plan.seconds)
        return Jet.of(torch.cat([x[None], x.new_zeros(further, *x.shape)]), plan)

    @staticmethod
    def at(points: Tensor, plan: Plan) -> Jet | TracedJet:
        """Return the coordinates of points ``[..., d]``, whose first derivatives are the unit vectors."""
        ones = torch.eye(plan.coordinates, dtype=points.dtype, device=points.device)
        ones = ones.reshape(plan.coordinates, *[1] * (points.ndim - 1), plan.coordinates)
        ones = ones.expand(plan.coordinates, *points.shape)
        zeros = torch.zeros_like(points).expand(len(plan.seconds), *points.shape)
        return Jet.of(torch.cat([points[None], ones, zeros]), plan)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"Jet of {self.rows.shape[0]} rows of shape {tuple(self.rows.shape[1:])}"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse what is called outside of the network, where no rule is applied."""
        raise ValueError(
            f"network: {resolve_name(func) or func} is called outside of the network on what depends on the points; "
            "return it from the network"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse an operation that no function mode saw, as within a custom ``torch.autograd.Function``."""
        raise ValueError(
            f"network: {operation} has no rule for what depends on the points: does the network call it within a "
            "custom torch.autograd.Function or a transformation of torch.func? Write it by torch's functions"
        )


class TracedJet:
    """A jet inside the compiler, which follows no tensor of a class of its own.

    The network sees a tensor without values in its place (``stand_in``), which the mode knows by identity. What a
    function returns that the mode does not see is on the same device ``meta``, by which the mode refuses it.

    Attributes:
        rows: As of a ``Jet``.
        plan: Likewise.
    """

    def __init__(self, rows: Tensor, plan: Plan) -> None:
        self.rows, self.plan = rows, plan

    def stand_in(self) -> Tensor:
        """Return the tensor that the network sees."""
        return torch.empty(self.rows.shape[1:], dtype=self.rows.dtype, device="meta")


AnyJet = Jet | TracedJet
"""A jet of either kind."""


def is_jet(x: Any) -> bool:
    """Return whether something is a jet, of either kind."""
    return isinstance(x, AnyJet)


Traced = list[tuple[Tensor, TracedJet]]
"""The jets inside the compiler, by the tensors in their places."""


def lifted(traced: Traced, x: Any) -> Any:
    """Return an argument with jets in the place of the tensors that stand for them."""

    def lift(one: Any) -> Any:
        for tensor, jet in traced:  # identities, which are no numbers to the compiler
            if tensor is one:
                return jet
        return one

    return _each(x, lift)


def lowered(traced: Traced, x: Any) -> Any:
    """Return a result with tensors in the place of its jets, which ``traced`` takes up."""

    def lower(one: Any) -> Any:
        if not isinstance(one, TracedJet):
            return one
        tensor = one.stand_in()
        traced.append((tensor, one))
        return tensor

    return _each(x, lower)


def rows_at(first: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return first derivatives by number, ``[numbers, ...]``; static ones, where an index would be a tensor."""
    if tuple(numbers) == tuple(range(first.shape[0])):
        return first
    rows = first.unbind(0)
    return torch.stack([rows[i] for i in numbers])


def holds_hidden(x: Any) -> bool:
    """Return whether there is a tensor among arguments that the network made of a stand-in, where no mode saw it."""
    if isinstance(x, tuple | list):
        return any(holds_hidden(one) for one in x)
    return isinstance(x, Tensor) and not is_jet(x) and x.device.type == "meta"


def holds_jet(x: Any) -> bool:
    """Return whether there is a jet among arguments."""
    return any(holds_jet(one) for one in x) if isinstance(x, tuple | list) else is_jet(x)


def jets_of(args: Any, kwargs: dict[str, Any]) -> list[AnyJet]:
    """Return the jets among arguments, in the order in which ``replaced`` takes them."""
    jets: list[AnyJet] = []

    def see(x: Any) -> Any:
        if is_jet(x):
            jets.append(x)
        return x

    _each(list(args), see)
    _each(list(kwargs.values()), see)
    return jets


def replaced(args: Any, kwargs: dict[str, Any], tensors: Sequence[Tensor]) -> tuple[Any, dict[str, Any]]:
    """Return arguments with tensors in the place of their jets."""
    left = iter(tensors)

    def replace(x: Any) -> Any:
        return next(left) if is_jet(x) else x

    changed = [_each(x, replace) for x in args]
    return changed, {name: _each(x, replace) for name, x in kwargs.items()}


def _each(x: Any, change: Callable[[Any], Any]) -> Any:
    """Return an argument with each entry of its tuples and lists changed."""
    if isinstance(x, tuple | list) and type(x) in (tuple, list):
        return type(x)([_each(one, change) for one in x])
    return change(x)
