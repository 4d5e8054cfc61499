"""The few tree operations that ``optree`` lacks."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.checks import need_number
from lrkfac.core.types import Layers, PerParameter, Tree
from lrkfac.core.unformed import Unformed, added


def vdot(x: Tree, y: Tree, weights: Tree | None = None) -> Tensor:
    """Inner product of two trees: the sum over all leaves of ``sum(x * y)``, or of its product with a weight, ``[]``.

    Half-precision leaves are summed in float32.
    """
    products = optree.tree_leaves(optree.tree_map(_vdot, x, y))
    if weights is not None:
        products = [weight * one for weight, one in zip(optree.tree_leaves(weights), products, strict=True)]
    return torch.stack(products).sum() if products else torch.zeros(())


def add_scaled(x: Tree, scale: PerParameter, y: Tree) -> Tree:
    """``x + scale * y`` leaf by leaf, in the dtype of ``x``; what is not formed in ``x`` stays so."""

    def one(a: Any, b: Any, c: float | Tensor) -> Any:
        if isinstance(a, Unformed):
            return a.plus(_formed(b), c)
        if isinstance(b, Unformed):
            return b.scaled(c).plus(a).form().to(a.dtype)
        return added(a, c, b).to(a.dtype)

    if is_number(scale):
        return optree.tree_map(lambda a, b: one(a, b, scale), x, y)
    return optree.tree_map(one, x, y, scale)


def scaled(scale: PerParameter, x: Tree) -> Tree:
    """``scale * x`` leaf by leaf, in the dtype of ``x``."""

    def one(a: Any, c: float | Tensor) -> Any:
        return a.scaled(c) if isinstance(a, Unformed) else (c * a).to(a.dtype)

    return optree.tree_map(lambda a: one(a, scale), x) if is_number(scale) else optree.tree_map(one, x, scale)


def is_number(given: Any) -> bool:
    """Whether one number, or tensor ``[]``, is given for all leaves."""
    return isinstance(given, int | float | Tensor)


def spread(given: Any, tree: Tree, name: str) -> Tree:
    """A tree of values like another, from one that may end earlier.

    Raises:
        ValueError: If it does not fit.
    """
    try:
        return optree.tree_map(lambda value, part: optree.tree_map(lambda _: value, part), given, tree)
    except ValueError as error:
        raise ValueError(
            f"{name}: expected a tree like the parameters, or one that ends earlier, got {given!r} ({error})"
        ) from error


def of_leaves(given: PerParameter, tree: Tree, name: str) -> PerParameter:
    """A number as it is, and a tree of numbers with one for each leaf of the tree.

    Raises:
        ValueError: If it does not fit.
    """
    return given if is_number(given) else spread(given, tree, name)


def at_step(given: PerParameter, step: Tensor) -> PerParameter:
    """The number, or the tree of numbers, with the values of schedules at a step."""
    return optree.tree_map(lambda one: one(step) if callable(one) else one, given)


def need_numbers(given: Any, name: str, low: float, high: float = math.inf, schedules: bool = False) -> None:
    """Refuses what is neither a number in ``[low, high)``, nor a tree of such; schedules are numbers where they may be.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If a leaf is no number, or there is none.
    """
    leaves = optree.tree_leaves(given, none_is_leaf=True)
    if not leaves:
        raise TypeError(f"{name}: expected a number, or a tree of numbers like the parameters, got {given!r}")
    for path, leaf in zip(optree.tree_paths(given, none_is_leaf=True), leaves, strict=True):
        if not (schedules and callable(leaf)):
            need_number(leaf, f"{name} at {'.'.join(map(str, path))!r}" if path else name, low, high)


def zeros_like(x: Tree) -> Tree:
    """A tree of zeros with the shapes, dtypes and devices of ``x``."""
    return optree.tree_map(
        lambda a: a.left.new_zeros(a.shape, dtype=a.dtype) if isinstance(a, Unformed) else torch.zeros_like(a), x
    )


def selected(condition: Tensor, new: Tree, old: Tree) -> Tree:
    """``new`` where the condition ``[]`` holds, else ``old``; what has not changed is passed on."""
    return optree.tree_map(lambda x, y: x if x is y else torch.where(condition, x, y), new, old)


def zero_unless(condition: Tensor, x: Tree) -> Tree:
    """The tree where the condition ``[]`` holds, else zeros, whatever the entries are."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Unformed):
            return torch.where(condition, leaf, 0)
        return Unformed(one(leaf.left), one(leaf.right), leaf.dtype, tuple([(c, one(t)) for c, t in leaf.terms]))

    return optree.tree_map(one, x)


def formed(x: Tree) -> Tree:
    """The tree with tensors for all leaves.

    Raises:
        TypeError: If a leaf is neither tensor nor ``Unformed``.
    """
    return optree.tree_map(_formed, x)


def unformed_like(x: Tree, y: Tree) -> Tree:
    """``y`` with leaves that are still to be scaled and added to where those of ``x`` are not formed."""
    return optree.tree_map(lambda a, b: Unformed.of(b) if isinstance(a, Unformed) else b, x, y)


def _formed(leaf: Any) -> Any:
    if isinstance(leaf, Unformed):
        return leaf.dense()
    if not isinstance(leaf, Tensor):
        raise TypeError(f"formed: expected x to be a tree of tensors, got {type(leaf).__name__} in it")
    return leaf


def _vdot(a: Any, b: Any) -> Tensor:
    if isinstance(a, Unformed) or isinstance(b, Unformed):
        a, b = (a, b) if isinstance(a, Unformed) else (b, a)
        return wide(a).vdot(wide(b))
    return torch.dot(wide(a).reshape(-1), wide(b).reshape(-1))


def as_row(x: Tree) -> Tensor:
    """All leaves in one row, ``[P]``, in the widest of their dtypes, at least float32."""
    return torch.cat([wide(leaf).reshape(-1) for leaf in optree.tree_leaves(x)])


def from_row(row: Tensor, like: Tree) -> Tree:
    """The inverse of ``as_row``: a tree with the shapes and dtypes of another."""
    leaves, structure = optree.tree_flatten(like)
    parts = row.split([leaf.numel() for leaf in leaves])
    cast = [part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    return optree.tree_unflatten(structure, cast)


def counter(x: Tree) -> Tensor:
    """A zero to count steps with: int64, ``[]``, on the device of the first leaf of ``x``."""
    leaves = optree.tree_leaves(x)
    return torch.zeros((), dtype=torch.int64, device=leaves[0].device if leaves else None)


def wide(x: Any) -> Any:
    """``x`` in at least float32, the least precision in which sums and factors are kept."""
    if isinstance(x, Unformed):
        return Unformed(wide(x.left), wide(x.right), x.dtype, tuple([(c, wide(t)) for c, t in x.terms]))
    return x if x.dtype in (torch.float32, torch.float64) else floating(x, torch.float32)


def floating(x: Any, dtype: torch.dtype) -> Any:
    """``x`` in a dtype, integers and numbers as they are; what is not formed keeps its own, and has its rows in it."""
    if isinstance(x, Unformed):
        rows = floating(x.left, dtype), floating(x.right, dtype)
        return Unformed(*rows, x.dtype, tuple([(c, floating(t, dtype)) for c, t in x.terms]))
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def floating_dtype(x: Tree) -> torch.dtype:
    """The dtype of the first leaf of ``x`` that is no integer."""
    return next(leaf.dtype for leaf in optree.tree_leaves(x) if leaf.is_floating_point())


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that holds numbers of all of these."""
    first = dtypes[0]  # torch counts a promotion as an operation
    return first if all(dtype == first for dtype in dtypes) else reduce(torch.promote_types, dtypes)


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Turns ``torch.autocast`` off on the device of a tensor: factors and inverses would be rounded to bfloat16."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def paths(x: Tree) -> tuple[str, ...]:
    """The dotted path of every leaf, in the order of ``optree.tree_leaves``."""
    return tuple(".".join(str(_key(entry)) for entry in accessor) for accessor in optree.tree_accessors(x))


def _key(entry: optree.PyTreeEntry) -> Any:
    return entry.field if isinstance(entry, optree.NamedTupleEntry) else entry.entry


def difference(expected: Tree, got: Tree) -> str | None:
    """In what the structure of a tree differs from that of another, in words; ``None`` where it does not."""
    # The compiler cannot compare structures; paths, which it can, take too long for every eager step.
    compiling = torch.compiler.is_compiling()
    if paths(got) == paths(expected) if compiling else optree.tree_structure(got) == optree.tree_structure(expected):
        return None
    wanted, there = paths(expected), paths(got)
    missing = [path for path in wanted if path not in there]
    unexpected = [path for path in there if path not in wanted]
    return f"missing {missing}, unexpected {unexpected}" if missing or unexpected else f"{optree.tree_structure(got)}"


def check_like(expected: Tree, got: Tree, what: str) -> list[Tensor]:
    """The leaves of a tree, which is refused unless it has the structure and shapes of another.

    Raises:
        ValueError: Names the leaf that is missing, unexpected, of another shape or on another device, or is no
            floating-point tensor.
    """
    leaves, structure = optree.tree_flatten(got)
    likes, wanted = optree.tree_flatten(expected)
    same = not torch.compiler.is_compiling() and structure == wanted
    differs = None if same else difference(expected, got)
    if differs is not None:
        raise ValueError(
            f"{what}: the tree differs from the one at the start: {differs}; pass a tree like the parameters, "
            "or call find_layers() and init() again for others"
        )
    _check_devices(leaves, what)
    for i, (leaf, like) in enumerate(zip(leaves, likes, strict=True)):
        if not isinstance(leaf, Tensor | Unformed) or leaf.shape != like.shape:
            there_is = tuple(leaf.shape) if isinstance(leaf, Tensor | Unformed) else type(leaf).__name__
            raise ValueError(
                f"{what}: expected {paths(expected)[i]!r} of shape {tuple(like.shape)}, got {there_is}; pass a "
                "tree like the parameters, or call find_layers() and init() again for others"
            )
        device = like.device if isinstance(like, Tensor) else leaf.device
        if not leaf.dtype.is_floating_point or leaf.device != device:
            raise ValueError(
                f"{what}: expected {paths(expected)[i]!r} to be floating-point numbers on {device}, got {leaf.dtype} "
                f"on {leaf.device}"
            )
    return leaves


def check_stacked(expected: Tree, got: Tree, what: str) -> None:
    """Refuses a tree that is not one like another with one more axis of equal length in front of each leaf.

    Raises:
        ValueError: As ``check_like``.
    """
    leaves = optree.tree_leaves(got)
    count = leaves[0].shape[:1] if leaves and isinstance(leaves[0], Tensor) else torch.Size([0])
    check_like(optree.tree_map(lambda x: x.expand(*count, *x.shape), expected), got, what)


def check_tree(got: Tree, what: str) -> list[Tensor]:
    """The leaves of a tree, which is refused unless they are floating-point tensors.

    Raises:
        TypeError: Names the leaf that is something else.
        ValueError: If some are on the device "meta".
    """
    leaves: list[Tensor] = optree.tree_leaves(got)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor | Unformed) or not leaf.dtype.is_floating_point:
            there_is = leaf.dtype if isinstance(leaf, Tensor | Unformed) else type(leaf).__name__
            raise TypeError(f"{what}: expected floating-point tensors, got {there_is} at {paths(got)[i]!r}")
    if got is None:
        raise TypeError(f"{what}: expected a tree of tensors, got None")
    _check_devices(leaves, what)
    return leaves


def _check_devices(leaves: list[Any], what: str) -> None:
    """Of tensors without values there are none or all, as where nothing but shapes is asked for."""
    if len({leaf.device.type == "meta" for leaf in leaves if isinstance(leaf, Tensor)}) > 1:
        raise ValueError(f"{what}: expected tensors with values, got some on the device 'meta'")


def need_layers(given: Any) -> Layers:
    """Refuses what is not from ``find_layers``."""
    if not isinstance(given, Layers):
        raise TypeError(f"layers: expected what find_layers() returned, got {type(given).__name__}")
    return given
