"""Products of a batch with the Gauss-Newton, Fisher and Hessian matrix of its loss, and the operators made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.func import grad, jvp

from lrkfac.core.base.arguments import check_flag, check_integer, check_model, check_values
from lrkfac.core.base.leaves import tree_flatten, tree_leaves, tree_unflatten
from lrkfac.core.base.tree_checks import check_tree
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.data_curvature import Batches, DataCurvature, Rule, check_batches
from lrkfac.core.evaluation.derivatives import change, transposed
from lrkfac.core.evaluation.objective import Objective
from lrkfac.core.layers.padding import ConstantPadding
from lrkfac.core.likelihoods.joint import Joint, check_likelihood, joint
from lrkfac.core.likelihoods.protocol import Likelihood


@dataclass(frozen=True)
class AtParameters:
    """The function from parameters and batches to the operator.

    Attributes:
        rule: The product of one batch.
        objective: The model and its likelihood.
        chunk: Number of columns that go through the model at once.
    """

    rule: Rule
    objective: Objective
    chunk: int

    def __call__(self, params: Tree, batches: Batches) -> DataCurvature:
        """Return the matrix at some parameters, as the mean over batches.

        Args:
            params: A tree of floating-point tensors.
            batches: Pairs ``(inputs, targets)`` that can be iterated over again: ``[(inputs, targets)]`` for a single
                batch, or a ``DataLoader``, whose order does not matter.

        Raises:
            ValueError: If there is no batch, or ``batches`` runs through only once.
            TypeError: If a leaf of ``params`` is no floating-point tensor, or batches are no pairs.
        """
        check_tree(params, "params")
        check_values(params=params)
        if not tree_leaves(params):
            raise ValueError("params: expected a tree of at least one tensor, got none")
        check_batches(batches)
        return DataCurvature(self.rule, self.objective, params, batches, self.chunk)


def ggn(
    model: Callable[[Tree, Tree], Any], likelihood: Likelihood | Joint, has_aux: bool = False, chunk: int = 8
) -> AtParameters:
    """Return the generalized Gauss-Newton matrix ``Jᵀ H J`` as a function of parameters and data.

    ``J`` is the derivative of the model's outputs in the parameters, ``H`` the Hessian of the loss in the outputs, both
    by automatic differentiation (Schraudolph 2002, Neural Computation 14(7)). A product costs a forward derivative and
    a gradient. The matrix is positive semidefinite where the loss is convex in the outputs, as for all likelihoods of
    the package, for which it equals ``fisher_product``. The model may be any pure function; no layers are needed.

    Args:
        model: Pure function ``model(params, inputs)``.
        likelihood: The likelihood of its outputs; ``joint(...)`` where they are a tree.
        has_aux: Whether the model returns ``(outputs, aux)``.
        chunk: Number of columns that go through the model at once, where an operator meets several.

    Returns:
        ``at(params, batches)``, which returns a ``DataCurvature``: an operator with ``product(tree)``,
        ``matvec(vector)``, ``to_dense()`` and ``as_scipy()``. ``batches`` are pairs ``(inputs, targets)``.

    Raises:
        ValueError: If ``chunk`` is below 1.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch, lrkfac
        >>> model = lambda params, inputs: inputs @ params["w"]
        >>> params, inputs = {"w": torch.zeros(3, 2)}, torch.eye(3)
        >>> matrix = lrkfac.curvature.ggn(model, lrkfac.gaussian())(params, [(inputs, torch.zeros(3, 2))])
        >>> matrix.product({"w": torch.ones(3, 2)})["w"][0].round(decimals=4)
        tensor([0.3333, 0.3333])
        >>> matrix.dimension, matrix.to_dense().trace()
        (6, tensor(2.))
    """
    return _at(_gauss_newton, model, likelihood, has_aux, chunk)


def fisher_product(
    model: Callable[[Tree, Tree], Any], likelihood: Likelihood | Joint, has_aux: bool = False, chunk: int = 8
) -> AtParameters:
    """Return the exact Fisher matrix ``Jᵀ F J`` as a function of parameters and data.

    ``F`` is the Fisher matrix of the likelihood in its outputs, by the likelihood's ``product`` or ``square_root``. It
    is what ``Evaluation.product`` applies for one batch, here for whole data sets and without layers. It differs from
    ``ggn`` only for a custom likelihood whose Hessian depends on the targets.

    Args:
        model: Pure function ``model(params, inputs)``.
        likelihood: The likelihood of its outputs; ``joint(...)`` where they are a tree.
        has_aux: Whether the model returns ``(outputs, aux)``.
        chunk: Number of columns that go through the model at once, where an operator meets several.

    Returns:
        ``at(params, batches)``, which returns a ``DataCurvature``; see ``ggn``.

    Raises:
        ValueError: If ``chunk`` is below 1.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch, lrkfac
        >>> model = lambda params, inputs: inputs @ params["w"]
        >>> params, inputs, targets = {"w": torch.zeros(1, 2)}, torch.ones(4, 1), torch.tensor([0, 1, 1, 1])
        >>> lrkfac.curvature.fisher_product(model, lrkfac.categorical())(params, [(inputs, targets)]).to_dense()
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]])
    """
    return _at(_fisher, model, likelihood, has_aux, chunk)


def hessian(
    model: Callable[[Tree, Tree], Any], likelihood: Likelihood | Joint, has_aux: bool = False, chunk: int = 8
) -> AtParameters:
    """Return the Hessian of the loss in the parameters as a function of parameters and data.

    It is symmetric, and in general not positive semidefinite. A product costs a forward derivative of a gradient
    (Pearlmutter 1994, Neural Computation 6(1)).

    Args:
        model: Pure function ``model(params, inputs)``.
        likelihood: The likelihood of its outputs; ``joint(...)`` where they are a tree.
        has_aux: Whether the model returns ``(outputs, aux)``.
        chunk: Number of columns that go through the model at once, where an operator meets several.

    Returns:
        ``at(params, batches)``, which returns a ``DataCurvature``; see ``ggn``.

    Raises:
        ValueError: If ``chunk`` is below 1.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch, lrkfac
        >>> model = lambda params, inputs: inputs * params["a"] * params["b"]
        >>> params = {"a": torch.ones(1), "b": torch.ones(1)}
        >>> data = [(torch.ones(1, 1), torch.zeros(1, 1))]
        >>> lrkfac.curvature.hessian(model, lrkfac.gaussian())(params, data).to_dense()
        tensor([[1., 2.],
                [2., 1.]])
        >>> lrkfac.curvature.ggn(model, lrkfac.gaussian())(params, data).to_dense()
        tensor([[1., 1.],
                [1., 1.]])
    """
    return _at(_hessian, model, likelihood, has_aux, chunk)


def _at(rule: Rule, model: Any, likelihood: Any, has_aux: Any, chunk: Any) -> AtParameters:
    check_model(model)
    check_likelihood(likelihood)
    check_flag(has_aux, "has_aux")
    check_integer(chunk, "chunk")
    heads = likelihood if isinstance(likelihood, Joint) else joint(likelihood)
    return AtParameters(rule, Objective(model, heads, has_aux), chunk)


Curved = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


def _sandwich(
    objective: Objective, params: Tree, inputs: Tree, targets: list[Tensor], tangent: Tree, curved: Curved
) -> tuple[Tree, Tensor]:
    """Return ``Jᵀ curved(outputs, J tangent)`` and the weight of the batch."""

    def outputs_at(params: Tree) -> list[Tensor]:
        with ConstantPadding():
            return objective.outputs(params, inputs)

    outputs, changed = change(outputs_at, params, tangent)
    _, transpose, _ = transposed(lambda params: (objective.outputs(params, inputs), []), params)
    return transpose(curved(outputs, changed)), objective.heads.total_weight(outputs, targets)


def _gauss_newton(
    objective: Objective, params: Tree, inputs: Tree, targets: list[Tensor], tangent: Tree
) -> tuple[Tree, Tensor]:
    def curved(outputs: list[Tensor], changed: list[Tensor]) -> list[Tensor]:
        return jvp(grad(lambda f: objective.heads.loss(f, targets)), (outputs,), (changed,))[1]

    return _sandwich(objective, params, inputs, targets, tangent, curved)


def _fisher(
    objective: Objective, params: Tree, inputs: Tree, targets: list[Tensor], tangent: Tree
) -> tuple[Tree, Tensor]:
    def curved(outputs: list[Tensor], changed: list[Tensor]) -> list[Tensor]:
        return objective.heads.product(outputs, targets, changed)

    return _sandwich(objective, params, inputs, targets, tangent, curved)


def _hessian(
    objective: Objective, params: Tree, inputs: Tree, targets: list[Tensor], tangent: Tree
) -> tuple[Tree, Tensor]:
    _, structure = tree_flatten(params)

    def gradient(params: Tree) -> list[Tensor]:
        def loss(params: Tree) -> tuple[Tensor, Tensor]:
            with ConstantPadding():
                outputs = objective.outputs(params, inputs)
            return objective.heads.loss(outputs, targets), objective.heads.total_weight(outputs, targets)

        gradients, weight = grad(loss, has_aux=True)(params)
        return [*tree_leaves(gradients), weight]

    (*_, weight), (*product, _) = change(gradient, params, tangent)
    return tree_unflatten(structure, product), weight
