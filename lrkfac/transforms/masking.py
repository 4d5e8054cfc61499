"""Different transformations for different parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
from torch import Tensor

from lrkfac.core.base.per_parameter import spread
from lrkfac.core.base.tree_checks import check_like, check_tree, paths
from lrkfac.core.base.trees import zeros_like
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.transforms.base import (
    GradientTransformation,
    check_evaluation,
    check_params,
    check_state,
    check_transformation,
    transformation,
)


class MaskedState(NamedTuple):
    """``inner``: the state of the transformation."""

    inner: Any


class PartitionState(NamedTuple):
    """``inner``: the state of each transformation by its label."""

    inner: dict[Any, Any]


def masked(inner: GradientTransformation, mask: Tree | Callable[[Tree], Tree]) -> GradientTransformation:
    """Apply ``inner`` where the mask is ``True``; elsewhere updates pass unchanged.

    ``inner`` sees the parameters as the transformations of ``partition`` do.

    Args:
        inner: The transformation.
        mask: A tree of ``bool`` like the parameters, or one that ends earlier: ``{"encoder": True, "head": False}``;
            or a function that makes it from a tree like the parameters.

    Returns:
        A transformation with a ``MaskedState``.

    Raises:
        ValueError: In ``init`` and ``update``, if the mask does not fit the parameters, or the state is another's.
        TypeError: If ``inner`` is no ``GradientTransformation``; in ``init`` and ``update``, if a leaf of the mask is
            no ``bool``.

    Examples:
        >>> import torch, lrkfac
        >>> tx = masked(lrkfac.scale(-1.0), {"encoder": True, "head": False})
        >>> updates = {"encoder": torch.ones(1), "head": torch.ones(1)}
        >>> tx.update(updates, tx.init(updates))[0]
        {'encoder': tensor([-1.]), 'head': tensor([1.])}
    """
    check_transformation(inner, "inner")
    return transformation(Masked(inner, mask))


def partition(
    transformations: Mapping[Any, GradientTransformation], labels: Tree | Callable[[Tree], Tree]
) -> GradientTransformation:
    """Apply to each parameter the transformation of its label.

    K-FAC where a layer covers the parameter and Adam for the rest is ``partition({"kfac": low_rank_kfac(layers, 0.1),
    "adam": chain(scale_by_adam(), scale(-1e-3))}, optree.tree_map(lambda p: "kfac" if p.index in layers.covered else
    "adam", layers.tree))``.

    Each transformation sees the loss as a function of its own parameters, with all others fixed, in a tree of the
    whole structure: there ``params``, ``updates`` and ``evaluation.grads`` of the others are zero (so that norms and
    ``clip_by_kl`` count its own alone), ``evaluation.product``, ``quadratic`` and ``gram`` are the Fisher matrix of its
    own, and ``evaluation.loss_at`` keeps the others where they are. A weight and its joint bias, which
    ``precondition_by_fisher`` treats as one matrix, belong under one label. States that are like the parameters, such
    as averages, take the memory of all of them, once for each label.

    Args:
        transformations: One for each label.
        labels: A tree of labels like the parameters, or one that ends earlier: ``{"encoder": "kfac", "head":
            "adam"}``; or a function that makes it from a tree like the parameters. Strings or numbers.

    Returns:
        A transformation with a ``PartitionState``.

    Raises:
        ValueError: In ``init`` and ``update``, if the labels do not fit the parameters, one has no transformation, or
            the state is another's.
        TypeError: If something is no ``GradientTransformation``.

    Examples:
        >>> import torch, lrkfac
        >>> tx = partition({"up": lrkfac.scale(1.0), "down": lrkfac.scale(-1.0)}, {"encoder": "up", "head": "down"})
        >>> updates = {"encoder": torch.ones(1), "head": torch.ones(1)}
        >>> tx.update(updates, tx.init(updates))[0]
        {'encoder': tensor([1.]), 'head': tensor([-1.])}
    """
    if not isinstance(transformations, Mapping):
        raise TypeError(f"transformations: expected a mapping from labels, got {type(transformations).__name__}")
    for label, one in transformations.items():
        check_transformation(one, f"transformations[{label!r}]")
    return transformation(Partition(dict(transformations), labels))


@dataclass(frozen=True, eq=False)
class Masked:
    """See ``masked``."""

    inner: GradientTransformation
    mask: Tree | Callable[[Tree], Tree]

    def init(self, params: Tree) -> MaskedState:
        """Return the inner state for the chosen parameters."""
        check_tree(params, "params")
        return MaskedState(self.inner.init(_only(self._chosen(params), params)))

    def update(self, updates: Tree, state: MaskedState, params: Tree = None, **extra: Any) -> tuple[Tree, MaskedState]:
        """Apply the inner transformation to the chosen parameters; pass the other updates."""
        check_tree(updates, "updates")
        check_state(state, MaskedState)
        chosen = self._chosen(updates)
        changed, new = _restricted(self.inner, chosen, updates, state.inner, params, extra)
        leaves = zip(chosen, changed, optree.tree_leaves(updates), strict=True)
        return _like(updates, [x if one else u for one, x, u in leaves]), MaskedState(new)

    def _chosen(self, tree: Tree) -> list[bool]:
        chosen = _spread("mask", self.mask, tree)
        for i, one in enumerate(chosen):
            if not isinstance(one, bool):
                raise TypeError(
                    f"mask: expected True or False for {paths(tree)[i]!r}, got {one!r}; it is fixed, not a tensor"
                )
        return chosen


@dataclass(frozen=True, eq=False)
class Partition:
    """See ``partition``."""

    transformations: dict[Any, GradientTransformation]
    labels: Tree | Callable[[Tree], Tree]

    def init(self, params: Tree) -> PartitionState:
        """Return each transformation's state for its parameters."""
        check_tree(params, "params")
        labels = self._labels(params)
        return PartitionState(
            {label: tx.init(_only([x == label for x in labels], params)) for label, tx in self.transformations.items()}
        )

    def update(
        self, updates: Tree, state: PartitionState, params: Tree = None, **extra: Any
    ) -> tuple[Tree, PartitionState]:
        """Apply each transformation to its parameters."""
        check_tree(updates, "updates")
        if not isinstance(state, PartitionState) or state.inner.keys() != self.transformations.keys():
            got = f"one of {list(state.inner)}" if isinstance(state, PartitionState) else type(state).__name__
            raise ValueError(_OTHER_STATE.format(expected=f"PartitionState of {list(self.transformations)}", got=got))
        labels, leaves, states = self._labels(updates), optree.tree_leaves(updates), {}
        for label, tx in self.transformations.items():
            chosen = [x == label for x in labels]
            changed, states[label] = _restricted(tx, chosen, updates, state.inner[label], params, extra)
            leaves = [x if one else old for one, x, old in zip(chosen, changed, leaves, strict=True)]
        return _like(updates, leaves), PartitionState(states)

    def _labels(self, tree: Tree) -> list[Any]:
        labels = _spread("labels", self.labels, tree)
        for i, label in enumerate(labels):
            if label not in self.transformations:
                raise ValueError(
                    f"labels: expected one of {list(self.transformations)} for {paths(tree)[i]!r}, got {label!r}; give "
                    "a transformation for it, such as identity()"
                )
        return labels


_OTHER_STATE = (
    "state: expected a {expected}, got {got}; pass what init() or the last update() of this transformation returned"
)


def _restricted(
    inner: GradientTransformation, chosen: list[bool], updates: Tree, state: Any, params: Tree, extra: dict[str, Any]
) -> tuple[list[Tensor], Any]:
    """Return the inner updates, of which only the chosen leaves count, and the inner state."""
    if params is not None:
        check_like(params, updates, "updates beside params")
    known = None if params is None else _only(chosen, params)
    evaluation = extra.get("evaluation")
    if evaluation is not None:
        extra = {**extra, "evaluation": _of_chosen(chosen, check_evaluation(evaluation, "masked"), params)}
    changed, new = inner.update(_only(chosen, updates), state, known, **extra)
    return optree.tree_leaves(changed), new


def _of_chosen(chosen: list[bool], evaluation: Evaluation, params: Tree) -> Evaluation:
    """Return the evaluation of the loss as a function of the chosen parameters."""

    def loss_at(moved: Tree) -> Tensor:
        fixed = optree.tree_leaves(check_params(params, "masked, partition: loss_at", moved))
        leaves = zip(chosen, optree.tree_leaves(moved), fixed, strict=True)
        return evaluation.loss_at(_like(moved, [x if one else p for one, x, p in leaves]))

    return evaluation._replace(
        grads=_only(chosen, evaluation.grads),
        product=lambda tangent: _only(chosen, evaluation.product(_only(chosen, tangent))),
        quadratic=lambda u, v: evaluation.quadratic(_only(chosen, u), _only(chosen, v)),
        gram=lambda tangents, *others: evaluation.gram(*[_only(chosen, one) for one in (tangents, *others)]),
        loss_at=loss_at,
    )


def _only(chosen: list[bool], tree: Tree) -> Tree:
    """Return the tree with zeros for the leaves that are not chosen."""
    leaves = zip(chosen, optree.tree_leaves(tree), strict=True)
    return _like(tree, [x if one else zeros_like(x) for one, x in leaves])


def _like(tree: Tree, leaves: list[Any]) -> Tree:
    return optree.tree_unflatten(optree.tree_structure(tree), leaves)


def _spread(name: str, given: Any, tree: Tree) -> list[Any]:
    """Return one value for each leaf of the tree, from a tree of values that may end earlier, or a function of it."""
    return optree.tree_leaves(spread(given(tree) if callable(given) else given, tree, name))
