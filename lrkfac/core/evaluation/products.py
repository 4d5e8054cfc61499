"""Products with the exact Fisher matrix of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import optree
import torch
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.autograd import recording
from lrkfac.core.base.by_autograd import attached, autograd_enabled, constant
from lrkfac.core.base.dtypes import wide
from lrkfac.core.base.tree_checks import check_like, check_stacked
from lrkfac.core.base.trees import materialize
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.derivatives import change, transposed
from lrkfac.core.evaluation.objective import Objective
from lrkfac.core.evaluation.tangents import ThinPass
from lrkfac.core.evaluation.ways import Ways
from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.padding import with_constant_padding


@dataclass(frozen=True, eq=False, repr=False)
class FisherProducts:
    """The exact Fisher matrix ``F = Jᵀ H J`` of a batch as a linear map, and the batch's loss elsewhere.

    ``J`` is the derivative of the outputs in the parameters, ``H`` the Hessian of the loss in the outputs.

    Attributes:
        objective: The model and its likelihood.
        layers: The layers of the model.
        params: Where the batch was evaluated.
        inputs: Of the batch.
        targets: Of each head.
        differentiable: Whether autograd follows the products.
        thin: What is known of thin layers from the forward pass, if anything.
        ways: Those to the products of several tangents.
    """

    objective: Objective
    layers: Layers
    params: Tree
    inputs: Tree
    targets: list[Tensor]
    differentiable: bool
    thin: ThinPass | None = None
    ways: Ways = field(default_factory=Ways)

    def product(self, tangent: Tree) -> Tree:
        """Return ``F tangent``, a tree like the parameters.

        Raises:
            ValueError: If the tree does not fit the parameters.
            NotImplementedError: If an operation of the model has no forward derivative.
        """
        check_like(self.params, tangent, "product: tangent")
        with recording(self.differentiable):
            outputs, change = self._change(materialize(tangent))
            _, transpose, _ = transposed(lambda params: (self._outputs(params), []), self.params, self.layers.autograd)
            return transpose(self.objective.heads.product(outputs, self.targets, change))

    def gram(self, tangents: Tree, *others: Tree) -> Tensor:
        """Return ``uᵢᵀ F uⱼ``, ``[k, k]``, for ``k`` tangents, or one tree of them stacked along a leading axis.

        Raises:
            ValueError: If a tree does not fit the parameters.
            NotImplementedError: As ``product``.
        """
        each = [tangents, *others]
        for one in each if others else ():
            check_like(self.params, one, "gram: tangents")
        if not others:
            check_stacked(self.params, tangents, "gram: tangents")
            count = optree.tree_leaves(tangents)[0].shape[0]
            each = [optree.tree_map(itemgetter(i), tangents) for i in range(count)]
        with recording(self.differentiable):
            changes, curved = self._curved_changes(each)
            of_heads = [wide(c).flatten(1) @ wide(h).flatten(1).mT for c, h in zip(changes, curved, strict=True)]
            return torch.stack(of_heads).sum(dim=0)

    def quadratic(self, u: Tree, v: Tree) -> Tensor:
        """Return ``uᵀ F v``, ``[]``; raises as ``product``."""
        check_like(self.params, u, "quadratic: u")
        check_like(self.params, v, "quadratic: v")
        both = (materialize(u),) if v is u else (materialize(u), materialize(v))
        return self.gram(*both if len(both) > 1 else (optree.tree_map(lambda x: x[None], *both),))[0, -1]

    def loss_at(self, params: Tree) -> Tensor:
        """Return the loss of the batch at other parameters, ``[]``.

        Raises:
            ValueError: If the tree does not fit the parameters.
        """
        check_like(self.params, params, "loss_at: params")
        with recording(self.differentiable):
            if not self.layers.autograd:
                return self.objective.heads.loss(self.objective.outputs(params, self.inputs), self.targets)
            with autograd_enabled():
                outputs = self.objective.outputs(attached(params), constant(self.inputs))
            return self.objective.heads.loss(constant(outputs), self.targets)

    def _outputs(self, params: Tree) -> list[Tensor]:
        inputs = constant(self.inputs) if self.layers.autograd else self.inputs
        with with_constant_padding(self.layers):
            return self.objective.outputs(params, inputs)

    def _change(self, tangent: Tree) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs and ``J tangent``."""
        try:
            return change(self._outputs, self.params, tangent, self.layers.autograd)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"model: an operation has no forward derivative, which products with the Fisher need: {error}; "
                "attention has one under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), its modules in eval mode "
                "after torch.backends.mha.set_fastpath_enabled(False)"
            ) from error

    def _curved_change(self, tangent: Tree) -> tuple[list[Tensor], list[Tensor]]:
        """Return ``J tangent`` and ``H J tangent``."""
        return self._curved(*self._change(tangent))

    def _curved(self, outputs: list[Tensor], change: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return change, self.objective.heads.product(outputs, self.targets, change)

    def _curved_changes(self, tangents: Sequence[Tree]) -> tuple[list[Tensor], list[Tensor]]:
        """Return ``J tangent`` and ``H J tangent`` of all tangents: one by one where the model cannot be mapped.

        A way that fails, as that of thin layers where the model has one without a forward derivative, or ran under
        ``torch.autocast`` and these products do not, is taken once.
        """
        failed = []
        if self.thin is not None and self.thin.fits(self.params) and self._open("thin"):
            try:
                return self.thin.along(self.objective, self.params, self.inputs, tangents, self._curved)
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, RuntimeError):
                failed.append("thin")  # another one comes below, if at all
        found = None
        if not self.layers.autograd and self._open("mapped"):
            try:
                found = vmap(self._curved_change)(optree.tree_map(lambda *x: torch.stack(x), *tangents))
            except NotImplementedError:
                raise
            except RuntimeError:  # such as a torch.autograd.Function without a rule for vmap
                if torch.compiler.is_compiling():
                    raise
                failed.append("mapped")
        if found is None:
            each = [self._curved_change(tangent) for tangent in tangents]
            found = optree.tree_map(lambda *leaves: torch.stack(leaves), *each)
        self.ways.close(failed, self.params, self.inputs)
        return found

    def _open(self, way: str) -> bool:
        return self.ways.open(way, self.params, self.inputs)
