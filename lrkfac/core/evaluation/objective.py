"""A model together with the likelihood of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.func import grad_and_value

from lrkfac.core.base.private_torch import without_checkpoints
from lrkfac.core.base.types import Tree
from lrkfac.core.likelihoods.joint import Joint, Leaves


@dataclass(frozen=True)
class Objective:
    """A loss as a function of parameters, inputs and targets.

    Attributes:
        model: Pure function ``model(params, inputs)``.
        heads: The likelihood of each head's outputs.
        has_aux: Whether the model returns ``(outputs, aux)``.
    """

    model: Callable[[Tree, Tree], Any]
    heads: Joint = field(hash=False)
    has_aux: bool

    def split(self, result: Any) -> tuple[list[Tensor], Any]:
        """Return the outputs of each head and the auxiliary result of what the model returned."""
        return self.heads.split(result, self.has_aux)

    def outputs(self, params: Tree, inputs: Tree) -> list[Tensor]:
        """Return the outputs of each head."""
        return self.split(self.run(params, inputs))[0]

    def run(self, params: Tree, inputs: Tree) -> Any:
        """Return the model's result."""
        with without_checkpoints():
            return self.model(params, inputs)

    def cotangent(self, outputs: Leaves, targets: Leaves) -> tuple[list[Tensor], Tensor]:
        """Return the gradient of the loss in the outputs of each head, and the loss, ``[]``."""
        gradient, loss = grad_and_value(lambda f: self.heads.loss(f, targets))(outputs)
        return gradient, loss
