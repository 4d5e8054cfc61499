"""The Laplace approximation of a posterior: a normal distribution around trained parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_function, check_number
from lrkfac.core.base.leaves import tree_leaves
from lrkfac.core.base.tree_checks import check_like, check_stacked
from lrkfac.core.base.trees import add_scaled, vdot
from lrkfac.core.base.types import Tree
from lrkfac.core.curvature.block_trees import members, on_trees, over_stack, stacked_axes
from lrkfac.core.curvature.layer_blocks import LayerBlocks, LayerRoots
from lrkfac.core.inference.rows import check_rows, example_columns, output_derivatives


class Predictive(NamedTuple):
    """Outputs of a linearised network under a posterior.

    Attributes:
        mean: ``[n, c]``.
        covariance: Of the outputs of each example, ``[n, c, c]``, without the noise of targets.
    """

    mean: Tensor
    covariance: Tensor


class Laplace(NamedTuple):
    """A normal posterior ``N(mean, (N F + δ I)⁻¹)``; ``curvature.laplace`` makes it.

    It is a pytree of tensors. Parameters that are in no block of the curvature stay at the mean.

    Attributes:
        mean: The trained parameters.
        likelihood: ``N F``, decomposed so that a multiple of the identity is only added.
        examples: ``N``, ``[]``.
        prior_precision: ``δ``, ``[]``.
        root: ``S`` with ``S Sᵀ = (N F + δ I)⁻¹``.

    Examples:
        >>> import torch, lrkfac
        >>> model, params = lrkfac.from_module(torch.nn.Linear(3, 2))
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator="exact")
        >>> fisher = lrkfac.curvature.estimate(evaluate, params, [(x, y)], layers, rank=2)
        >>> posterior = lrkfac.curvature.laplace(fisher, params, examples=8)
        >>> noise = {name: torch.randn(x.shape) for name, x in params.items()}
        >>> posterior.sample(noise)["weight"].shape, posterior.predictive(model, x).covariance.shape
        (torch.Size([2, 3]), torch.Size([8, 2, 2]))
    """

    mean: Tree
    likelihood: LayerBlocks
    examples: Tensor
    prior_precision: Tensor
    root: LayerRoots

    def sample(self, noise: Tree) -> Tree:
        """Return parameters drawn from the posterior.

        Args:
            noise: Standard normal numbers, a tree like the parameters. Several draws are
                ``torch.func.vmap(posterior.sample)(noise)``.

        Raises:
            ValueError: If the tree does not fit the parameters.
        """
        check_like(self.mean, noise, "noise")
        return add_scaled(self.mean, 1.0, self.root.matvec(noise))

    def predictive(self, model: Callable[[Tree, Tree], Tensor], inputs: Tree) -> Predictive:
        """Return mean and covariance of the outputs of the network linearised at the mean, ``J (N F + δ I)⁻¹ Jᵀ``.

        For logits ``f`` with the variances ``v`` on the diagonal, ``softmax(f / √(1 + π v / 8))`` is about the
        predictive probability (MacKay 1992). It takes one backward pass for each output, and, one layer after the
        other, ``n c`` gradients of single examples: give ``inputs`` in parts where these are too many.

        Args:
            model: ``model(params, inputs)``, that of the curvature, with outputs ``[n, ...]``.
            inputs: Of ``n`` examples.

        Raises:
            ValueError: If outputs of one example depend on others, or as the model.
            TypeError: If ``model`` is no function, or returns no tensor.
        """
        check_function(model, "model")
        layers, blocks = self.root.description.value, self.root.blocks
        if not (layers.independent and layers.single):
            raise ValueError(
                "predictive: expected outputs with one entry of the leading axis for each example, none of which "
                "depends on another example; print(layers) says what is known; use draws() instead"
            )
        outputs = model(self.mean, inputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"model: expected outputs that are a tensor, got {type(outputs).__name__}")
        names = tuple([layer.name for name in blocks for layer in members(layers, name)])
        statistics = output_derivatives(model, layers, self.mean, inputs, outputs, names)
        check_rows(blocks, layers, statistics, "predictive")
        count = outputs.shape[0]
        covariances = []
        for name, root in blocks.items():
            columns = example_columns(name, root, layers, statistics)
            axes = stacked_axes(name, members(layers, name), root)
            along: Tensor = over_stack(lambda one, x: one.rmatvec(x), axes)(root, columns)
            along = along.flatten(0, -2).unflatten(-1, (-1, count))
            covariances.append(torch.einsum("pcn,pdn->ncd", along, along))
        return Predictive(outputs.flatten(1), torch.stack(covariances).sum(dim=0))

    def draws(self, model: Callable[[Tree, Tree], Any], inputs: Tree, noise: Tree) -> Any:
        """Return the outputs of the network itself at parameters drawn from the posterior.

        Args:
            model: Any function of ``(params, inputs)``.
            inputs: As it takes them.
            noise: Standard normal numbers, a tree like the parameters with a leading axis of draws.

        Returns:
            The outputs, with a leading axis of draws.

        Raises:
            ValueError: If the tree does not fit the parameters.
            TypeError: If ``model`` is no function.
        """
        check_function(model, "model")
        check_stacked(self.mean, noise, "noise")
        count = tree_leaves(noise)[0].shape[0]
        each = [model(self.sample(optree.tree_map(lambda x, i=i: x[i], noise)), inputs) for i in range(count)]
        return optree.tree_map(lambda *x: torch.stack(x), *each)

    def log_evidence(self, loss: float | Tensor, prior_precision: float | Tensor | None = None) -> Tensor:
        """Return Laplace's approximation of the logarithm of the evidence ``p(targets)``, ``[]``, in nats.

        With ``p`` parameters ``θ`` in blocks, ``-N loss - δ ‖θ‖² / 2 + p log(δ) / 2 - log det(N F + δ I) / 2``:
        differentiable in ``δ``. Curvature and mean stay those at which the posterior was made.

        Args:
            loss: Mean negative log-likelihood at the mean, such as ``evaluation.loss``, with the constants of the
                likelihood where evidences of different ones are compared.
            prior_precision: ``δ`` in place of that of the posterior.

        Raises:
            ValueError: If ``prior_precision`` is not positive, or ``loss`` not finite.
            TypeError: If one of them is no number.
        """
        check_number(loss, "loss")
        delta: Any = self.prior_precision if prior_precision is None else prior_precision
        check_number(delta, "prior_precision", 0, includes_low=False)
        delta = torch.as_tensor(delta, dtype=self.examples.dtype, device=self.examples.device)
        inside = on_trees(self.likelihood.blocks, self.likelihood.layers, lambda operator, x: x, self.mean)
        of_prior = self.likelihood.dimension * delta.log() - delta * vdot(inside, inside)
        return (of_prior - self.likelihood.damped(delta).logdet()) / 2 - self.examples * loss


def laplace(
    curvature: LayerBlocks, params: Tree, examples: float | Tensor, prior_precision: float | Tensor = 1.0
) -> Laplace:
    """Return the Laplace approximation of the posterior of trained parameters (MacKay 1992).

    Under the prior ``N(0, I / δ)`` the posterior is about ``N(params, (N F + δ I)⁻¹)``, where ``params`` minimise
    ``N loss + δ ‖params‖² / 2``. Every block is damped exactly. For only the last layer, pass
    ``curvature.of_layers([name])``: all other parameters are then constants.

    Args:
        curvature: ``F`` at ``params``, the mean over all terms of the data, as ``estimate`` or ``from_state`` return.
        params: The mean.
        examples: ``N``, the number of terms of the likelihood in the data set: the sum of ``Evaluation.weight``.
        prior_precision: ``δ > 0``.

    Returns:
        The posterior, with ``sample``, ``predictive``, ``draws`` and ``log_evidence``.

    Raises:
        ValueError: If ``params`` do not fit the curvature, or a number is not positive and finite.
        TypeError: If ``curvature`` is none, a number is something else, or a block is the product of two
            ``LowRankPlusDiagonal``, which cannot be damped exactly.

    Examples:
        The prior precision with the largest evidence, by its derivative:

        >>> import torch, lrkfac
        >>> model, params = lrkfac.from_module(torch.nn.Linear(3, 2))
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator="exact")
        >>> fisher = lrkfac.curvature.estimate(evaluate, params, [(x, y)], layers, rank=2)
        >>> posterior = lrkfac.curvature.laplace(fisher, params, examples=8)
        >>> loss = evaluate(params, x, y, statistics=False).loss
        >>> slope = torch.func.grad(lambda d: posterior.log_evidence(loss, d))(torch.tensor(1.0))
    """
    if not isinstance(curvature, LayerBlocks):
        raise TypeError(f"curvature: expected what from_state() or estimate() returned, got {type(curvature).__name__}")
    check_like(curvature.layers.tree, params, "params")
    check_number(examples, "examples", 0, includes_low=False)
    check_number(prior_precision, "prior_precision", 0, includes_low=False)
    like = tree_leaves(curvature.blocks)[0]
    count, delta = (torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in (examples, prior_precision))
    likelihood = curvature.scale(count).damped(0.0)
    return Laplace(params, likelihood, count, delta, likelihood.damped(delta).inverse_root())
