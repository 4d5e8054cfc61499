"""Joint likelihoods of several heads; a single likelihood is the case of one head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import grad

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.containers import described, main_entry, named_entries, opened
from lrkfac.core.base.dtypes import wide
from lrkfac.core.base.leaves import tree_leaves, tree_structure, tree_unflatten
from lrkfac.core.base.tree_checks import difference
from lrkfac.core.base.types import Tree
from lrkfac.core.likelihoods.protocol import Likelihood

Leaves = Sequence[Tensor]
"""The outputs or targets of all heads, in the order of ``optree.tree_leaves``."""


@dataclass(frozen=True)
class Joint:
    """A sum of likelihoods ``Σ weightₕ lossₕ``, one for each leaf of a tree of outputs.

    A single likelihood is the tree with one leaf. The Fisher matrix is ``Σ weightₕ Fₕ``: heads are independent
    given the parameters.

    Attributes:
        tree: Likelihoods in the structure of the outputs.
        heads: Its leaves.
        weights: One for each head.
        part: Whether batches are parts of larger ones, and may be empty or count for nothing.
        totals: What the sums of each head are divided by, ``[]``, in place of the weight of its terms.
    """

    tree: Tree
    heads: tuple[Likelihood, ...]
    weights: tuple[float, ...]
    part: bool = False
    totals: tuple[Tensor, ...] | None = None

    def leaves(self, values: Tree, source: str, what: str = "") -> list[Tensor]:
        """Return the tensors of a tree with the structure of the heads; ``source`` and ``what`` name it in errors.

        Raises:
            TypeError: If the tree has another structure or a leaf that is no tensor.
        """
        if isinstance(self.tree, Likelihood):
            if not isinstance(values, Tensor):
                raise TypeError(f"{source}: expected {what}a tensor, got {described(values)}")
            return [values]
        values, _ = opened(values, source)
        leaves: list[Any] = tree_leaves(values)
        differs = difference(self.tree, values)
        if differs is not None:
            raise TypeError(f"{source}: expected {what}a tree in the structure of joint(...), got {differs}")
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{source}: expected {what}a tree of tensors, got {type(leaf).__name__} in it")
        return leaves

    def split(self, result: Any, has_aux: bool) -> tuple[list[Tensor], Any]:
        """Return the outputs of a model, head by head, and its auxiliary result (``None`` without ``has_aux``).

        Raises:
            TypeError: If the outputs have another structure than the likelihood.
            ValueError: If they are no floating-point numbers with a batch axis in front, or the batch is empty.
        """
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(f"model: expected (outputs, aux) with has_aux=True, got {type(result).__name__}")
        result, aux = result if has_aux else (result, None)
        try:
            outputs = self.leaves(self._of_heads(result), "model", "outputs as ")
        except TypeError as error:
            raise TypeError(
                f"{error}; pass has_aux=True if, and only if, the model returns (outputs, aux), joint(...) as the "
                "likelihood of several outputs, and from_module(module, output=...) to name one of them"
            ) from error
        for one in outputs:
            if one.ndim == 0 or not one.is_floating_point():
                remedy = "; return torch.view_as_real of them, or their abs()" if one.is_complex() else ""
                raise ValueError(
                    "model: expected floating-point outputs with a batch axis, got "
                    f"{one.dtype} of shape {tuple(one.shape)}{remedy}"
                )
            if one.numel() == 0 and not (self.part and one.shape[0] == 0):
                raise ValueError(f"inputs: the batch is empty: outputs have the shape {tuple(one.shape)}")
        return outputs, aux

    def _of_heads(self, outputs: Any) -> Any:
        """Return what the heads are of: ``logits`` for a single one, the entries that ``joint`` names for several."""
        if isinstance(self.tree, Likelihood):
            return main_entry(outputs)
        names = named_entries(self.tree)
        if names is None or isinstance(outputs, Tensor) or not optree.tree_is_leaf(outputs):
            return outputs
        entries = named_entries(outputs) or {}
        return {name: entries[name] for name in names} if names.keys() <= entries.keys() else outputs

    def unflatten(self, leaves: Leaves) -> Tree:
        """Return leaves as a tree: the inverse of ``leaves``."""
        return tree_unflatten(tree_structure(self.tree), list(leaves))

    def loss(self, outputs: Leaves, targets: Leaves) -> Tensor:
        """Return ``Σ weightₕ lossₕ``, ``[]``."""
        totals = self.totals or (None,) * len(self.heads)
        losses = [head.loss(f, y, t) for head, f, y, t in zip(self.heads, outputs, targets, totals, strict=True)]
        total = _times(self.weights[0], losses[0])
        for weight, loss in zip(self.weights[1:], losses[1:], strict=True):
            total = total + weight * loss
        return total

    def scores(self, outputs: Leaves, targets: Leaves, factors: Sequence[Tensor | float]) -> list[list[Tensor]]:
        """Return for each head the gradient of its terms at the targets times its factor, and zeros for the others."""
        columns = []
        for i, (head, f, y, factor) in enumerate(zip(self.heads, outputs, targets, factors, strict=True)):
            total = head.total_weight(f, y).clamp(min=torch.finfo(f.dtype).tiny).detach()
            score = grad(head.loss)(f, y, total) * total * factor
            columns.append([score.to(g.dtype) if j == i else torch.zeros_like(g) for j, g in enumerate(outputs)])
        return columns

    def head_weights(self, outputs: Leaves, targets: Leaves) -> tuple[Tensor, ...]:
        """Return ``Σ wₙ`` of each head, ``[]`` each, or ``totals`` in their place."""
        each = zip(self.heads, outputs, targets, strict=True)
        return self.totals or tuple([head.total_weight(f, y) for head, f, y in each])

    def total_weight(self, outputs: Leaves, targets: Leaves) -> Tensor:
        """Return ``Σ wₙ`` of a single head, the number of examples of the longest of several heads, ``[]``."""
        if len(self.heads) == 1:
            return self.heads[0].total_weight(outputs[0], targets[0])
        return torch.full((), longest_head(outputs).shape[0], dtype=wide(outputs[0]).dtype, device=outputs[0].device)

    def normalization(self, outputs: Leaves, targets: Leaves) -> tuple[Tensor, list[Tensor | float]]:
        """Return the scale of sums over rows, ``[]``, and for each head the factor of its rows.

        The scale is ``1 / Σ wₙ`` of a single head, and 1 over the number of examples (of the longest head) for several,
        whose rows make up for the difference. Where nothing counts they are finite all the same.
        """
        inverse = [
            weight / total.clamp(min=torch.finfo(total.dtype).tiny)
            for weight, total in zip(self.weights, self.head_weights(outputs, targets), strict=True)
        ]
        if len(inverse) == 1:
            return inverse[0], [1.0]
        examples = max(longest_head(outputs).shape[0], 1)
        return torch.full_like(inverse[0], 1 / examples), [(examples * x).sqrt() for x in inverse]

    def residuals(self, outputs: Leaves, targets: Leaves, factors: Sequence[Tensor | float]) -> tuple[Tensor, ...]:
        """Return ``ρ`` ``[columns, N]`` of each head: columns times ``factors`` add up with it to the loss' derivative.

        That is ``Σ wₙ`` times the derivative in the outputs of a single head, that times the number of examples for
        several. Empty where a likelihood has no ``residual``.
        """
        if any(head.residual is None for head in self.heads):
            return ()
        each = zip(self.heads, outputs, targets, factors, strict=True)
        return tuple([(factor * head.weighted_residual(f, y)).reshape(len(f), -1).mT for head, f, y, factor in each])

    def columns(self, outputs: Leaves) -> int:
        """Return the number of columns of the square root of every example's Hessian.

        One for each entry of all axes but the first: several terms of one example, such as the positions of a
        sequence, depend on the same weights, and one pass for all of them would mix them.
        """
        return sum(math.prod(f.shape[1:]) for f in outputs)

    def column(self, outputs: Leaves, targets: Leaves, number: Tensor) -> list[Tensor]:
        """Return column ``number`` (``[]``) of the square root, out of ``columns(outputs)``; like the outputs."""
        columns, first = [], 0
        for head, f, y in zip(self.heads, outputs, targets, strict=True):
            entries = math.prod(f.shape[1:])
            unit = (torch.arange(first, first + entries, device=f.device) == number).to(f.dtype)
            columns.append(head.weighted_root(f, y, unit.reshape(1, *f.shape[1:]).expand(f.shape)))
            first += entries
        return columns

    def product(self, outputs: Leaves, targets: Leaves, tangent: Leaves) -> list[Tensor]:
        """Return the (expected) Hessian of the loss in the outputs times a tangent; like the outputs."""
        totals = self.head_weights(outputs, targets)
        each = zip(self.weights, totals, self.heads, outputs, targets, tangent, strict=True)
        return [(weight / total * head.weighted_product(f, y, t)).to(f.dtype) for weight, total, head, f, y, t in each]


def longest_head(outputs: Leaves) -> Tensor:
    """Return the outputs of the head of most examples."""
    longest = outputs[0]  # without max(key=...), which the compiler does not know, and comparisons of a single head
    for other in outputs[1:]:
        longest = other if other.shape[0] > longest.shape[0] else longest
    return longest


def joint(likelihoods: Tree, weights: Tree | None = None) -> Joint:
    """Return the joint likelihood of several heads: the loss is the weighted sum of the mean losses of all heads.

    The Fisher matrix is the same sum. Heads may have different numbers of examples, each its own, such as points within
    a domain and on its boundary; the inputs are then a tree with one batch for each.

    The model returns a tree (dictionary, tuple, list, NamedTuple) of outputs, and targets are a tree of the same
    structure. Another mapping or a dataclass counts as the dictionary of its entries; as outputs it may have more of
    them than heads, which are not used.

    Examples:
        >>> import torch
        >>> from lrkfac import bernoulli, categorical, evaluator, find_layers
        >>> model = lambda params, x: {"mask": x @ params["mask"], "class": x @ params["class"]}
        >>> params, x = {"mask": torch.zeros(3, 2), "class": torch.zeros(3, 4)}, torch.ones(5, 3)
        >>> likelihood = joint({"mask": bernoulli(), "class": categorical()}, weights={"mask": 1.0, "class": 0.1})
        >>> evaluate = evaluator(model, likelihood, find_layers(model, params, x))
        >>> targets = {"mask": torch.ones(5, 2), "class": torch.zeros(5, dtype=torch.int64)}
        >>> round(evaluate(params, x, targets).loss.item(), 4)  # 2 log 2 + 0.1 log 4
        1.5249

    Args:
        likelihoods: One for each head.
        weights: Of each head's loss, nonnegative numbers in the same structure; by default 1.

    Returns:
        The likelihood, for ``evaluator``; it copies and pickles where its heads do.

    Raises:
        ValueError: If there is no head, ``weights`` have another structure, or one is negative or not finite.
        TypeError: If a leaf is no likelihood, or a weight no number.
    """
    heads = tuple(tree_leaves(likelihoods))
    for head in heads:
        if not isinstance(head, Likelihood):
            raise TypeError(
                f"likelihoods: expected a tree of likelihoods such as categorical(), got {head!r} in it{_remedy(head)}"
            )
    if not heads:
        raise ValueError("likelihoods: expected at least one head")
    numbers = tuple(tree_leaves(weights)) if weights is not None else (1.0,) * len(heads)
    differs = None if weights is None else difference(likelihoods, weights)
    if differs is not None:
        raise ValueError(f"weights: expected a number for each likelihood, in their structure, got {differs}")
    for number in numbers:
        if isinstance(number, Tensor):
            raise TypeError("weights: expected numbers, got a tensor")
        check_number(number, "weights", 0)
    return Joint(likelihoods, heads, numbers)


def check_likelihood(likelihood: Any) -> None:
    """Raise ``TypeError`` unless it is a likelihood, of one head or several."""
    if not isinstance(likelihood, Likelihood | Joint):
        raise TypeError(
            f"likelihood: expected a Likelihood such as categorical(), or joint(...), got {likelihood!r}"
            f"{_remedy(likelihood)}"
        )


def _remedy(likelihood: Any) -> str:
    """Return what to do about a function of the package that makes a likelihood, empty for other objects."""
    is_ours = isinstance(likelihood, FunctionType) and likelihood.__module__.startswith("lrkfac.core.likelihoods")
    return f"; call it: {likelihood.__name__}()" if is_ours else ""


def _times(weight: float, x: Tensor) -> Tensor:
    return x if weight == 1 else weight * x
