"""What a batch says at one point in parameter space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from lrkfac.core.base.types import Tree
from lrkfac.core.layers.statistics import Statistics


class Evaluation(NamedTuple):
    """Everything that a batch says at one point in parameter space.

    Attributes:
        loss: Mean negative log-likelihood, ``[]``.
        grads: Its gradient, a tree like the parameters; with ``thin=True``, some leaves are ``LazyMatrix``.
        outputs: The model's outputs, ``[N, ...]``, or a tree of them.
        aux: What else the model returned (``has_aux=True``), else ``None``.
        statistics: For ``precondition_by_fisher``; ``None`` where they were not asked for.
        product: ``product(tangent)`` is ``F tangent`` with the exact Fisher ``F`` of this batch.
        quadratic: ``quadratic(u, v)`` is ``uᵀ F v``, ``[]``.
        gram: ``gram(tangents)``, for a tree of ``k`` tangents along a leading axis, is ``uᵢᵀ F uⱼ``, ``[k, k]``, at
            the price of one forward pass and ``k`` forward derivatives.
        loss_at: ``loss_at(params)`` is the loss of this batch at other parameters, ``[]``.
        weight: With what this batch counts beside others: of a single likelihood the weights of all terms together
            (their number, where none has a weight), of several heads the number of examples, ``[]``.
        thin: Whether leaves of ``grads`` and of the updates made of them may be ``LazyMatrix``, see ``evaluator``.
    """

    loss: Tensor
    grads: Tree
    outputs: Tree
    aux: Any
    statistics: Statistics | None
    product: Callable[[Tree], Tree]
    quadratic: Callable[[Tree, Tree], Tensor]
    gram: Callable[[Tree], Tensor]
    loss_at: Callable[[Tree], Tensor]
    weight: Tensor
    thin: bool = False
