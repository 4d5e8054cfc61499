"""The evaluation of a batch at one point in parameter space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from lrkfac.core.base.processes import Among
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.statistics import Statistics


class Evaluation(NamedTuple):
    """Loss, gradient, statistics and Fisher products of a batch at one point in parameter space.

    ``evaluator`` makes the function that returns it; transformations take it as ``evaluation=``. It can be copied and
    pickled if the model and the likelihood can.

    Attributes:
        loss: Mean negative log-likelihood, ``[]``.
        grads: Gradient of the loss, a tree like the parameters; with ``thin=True``, some leaves are ``LazyMatrix``,
            and with ``scatter=True`` a process' own part; ``lrkfac.materialize`` makes tensors of both.
        outputs: The model's outputs, ``[N, ...]``, or a tree of them.
        aux: The model's auxiliary result (``has_aux=True``), else ``None``.
        statistics: For ``precondition_by_fisher``; ``None`` where the evaluation took none.
        product: ``product(tangent)`` is ``F tangent`` with the exact Fisher ``F`` of this batch.
        quadratic: ``quadratic(u, v)`` is ``uᵀ F v``, ``[]``.
        gram: ``gram(u, v, ...)`` is ``uᵢᵀ F uⱼ``, ``[k, k]``, for ``k > 1`` tangents, and ``gram(tangents)`` for one
            tree of them along a leading axis. It costs ``k`` forward derivatives and one forward pass, in which layers
            with lazy gradients have run already.
        loss_at: ``loss_at(params)`` is the loss of this batch at other parameters, ``[]``.
        weight: The weight of this batch beside others, ``[]``: the total weight of all terms (their number, where none
            has a weight); with several heads, the number of examples.
        thin: Whether leaves of ``grads`` and of the updates made of them may be ``LazyMatrix``, see ``evaluator``.
        among: The place of this process among those of a joint batch (``group=``), else ``None``. All other attributes
            are then of the joint batch, but for ``outputs``, ``aux``, ``size`` and the rows in ``statistics``.
        size: The number of entries of the outputs of the examples that ``statistics`` have, int64 ``[]``: by it, inputs
            of layers weigh beside those of other processes. ``None`` counts none.

    Examples:
        >>> import torch, lrkfac
        >>> model = lambda params, inputs: inputs @ params["w"]
        >>> params, inputs, targets = {"w": torch.zeros(3, 2)}, torch.ones(4, 3), torch.tensor([0, 1, 1, 1])
        >>> layers = lrkfac.find_layers(model, params, inputs)
        >>> evaluation = lrkfac.evaluator(model, lrkfac.categorical(), layers)(params, inputs, targets)
        >>> round(float(evaluation.loss), 4), evaluation.grads["w"].shape, int(evaluation.weight)
        (0.6931, torch.Size([3, 2]), 4)
        >>> evaluation.quadratic(evaluation.grads, evaluation.grads)
        tensor(0.5625)
    """

    loss: Tensor
    grads: Tree
    outputs: Tree
    aux: Any
    statistics: Statistics | None
    product: Callable[[Tree], Tree]
    quadratic: Callable[[Tree, Tree], Tensor]
    gram: Callable[..., Tensor]
    loss_at: Callable[[Tree], Tensor]
    weight: Tensor
    thin: bool = False
    among: Among | None = None
    size: Tensor | None = None
