"""Exact blocks: the second moment of the gradients of single examples, per unit, layer or model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import optree
from torch import Tensor
from torch.func import vmap

from lrkfac.core.curvature.factors import dense
from lrkfac.core.curvature.joining import ALONG_UNITS, APART, Joining
from lrkfac.core.curvature.protocol import BlockStatistics, BlockStructure, FactorStructure
from lrkfac.core.curvature.spectra import WHOLE, Part
from lrkfac.core.layers.matrix import LayerMatrix
from lrkfac.core.linalg.covariances import Covariance, RowCovariance
from lrkfac.core.linalg.operators import Operator


class ExactState(NamedTuple):
    """The state of the block's structure; leading axes are those of groups and units."""

    block: Any

    @property
    def is_product(self) -> bool:
        return False

    def factor_states(self) -> tuple[Any, ...]:
        return (self.block,)

    def parts(self, inverse: Any, dampings: Tensor) -> list[Part]:
        return [Part(WHOLE, self.block, inverse, dampings)]


@dataclass(frozen=True)
class ExactStructure(BlockStructure):
    """See ``layer_wise``, ``unit_wise`` and ``full``: the second moment of the examples' gradients themselves.

    Attributes:
        factor: Structure of one block.
        per: Whether a block is made for each output unit of a layer, for each layer (each group of it), or for
            all layers together.
    """

    factor: FactorStructure
    per: Literal["unit", "layer", "model"]

    @property
    def joins_layers(self) -> bool:
        return self.per == "model"

    @property
    def needs_independence(self) -> bool:
        return self.per != "unit" and not self.factor.stands_alone  # squares of single gradients are no whole block

    @property
    def joining(self) -> Joining:
        return ALONG_UNITS if self.per == "unit" else APART

    def fitted(self, d_in: int, d_out: int) -> ExactStructure:
        return ExactStructure(self.factor.fitted(d_in if self.per == "unit" else d_in * d_out), self.per)

    def init(self, d_in: int, d_out: int, like: Tensor) -> ExactState:
        """Return the state before the first batch; of ``d_out`` blocks where there is one for each unit."""
        if self.per != "unit":
            return ExactState(self.factor.init(d_in * d_out, like))
        one = self.factor.init(d_in, like)
        return ExactState(optree.tree_map(lambda x: x.expand(d_out, *x.shape).clone(), one))

    def update_from(self, state: ExactState, statistics: BlockStatistics, decay: float | Tensor) -> ExactState:
        def one(state: Any, covariance: Covariance) -> Any:
            return self.factor.update(state, statistics.summed(covariance), decay)

        return ExactState(self._with_covariance(one, state, statistics))

    @property
    def rounds(self) -> int:
        return self.factor.rounds

    def begin(self, state: ExactState, decay: float | Tensor) -> ExactState:
        return ExactState(self._of_each(lambda one: self.factor.begin(one, decay), state.block))

    def question(self, carry: ExactState, round: int) -> ExactState:
        return ExactState(self.factor.question(carry.block, round))

    def measure(self, question: ExactState, statistics: BlockStatistics, round: int) -> Any:
        return self._with_covariance(lambda one, x: self.factor.measure(one, x, round), question, statistics)

    def advance(self, carry: ExactState, answers: Any, round: int) -> ExactState:
        return ExactState(self._of_each(lambda one, x: self.factor.advance(one, x, round), carry.block, answers))

    def _of_each(self, function: Callable[..., Any], *trees: Any) -> Any:
        """Return the function of every unit, where there is a block for each."""
        return vmap(function)(*trees) if self.per == "unit" else function(*trees)

    def _with_covariance(
        self, function: Callable[[Any, Covariance], Any], state: ExactState, statistics: BlockStatistics
    ) -> Any:
        """Return the function of a block and its covariance, from examples' gradients ``[n, d_out, d_in]``."""
        gradients, scale = statistics.example_gradients(), statistics.scale
        if self.per != "unit":
            return function(state.block, RowCovariance(gradients.flatten(1), scale))
        of_rows = vmap(lambda one, rows: function(one, RowCovariance(rows, scale)), in_dims=(0, 1))
        return of_rows(state.block, gradients)

    def operator(self, state: ExactState) -> Operator:
        return self.factor.operator(state.block)

    def damped_inverse(self, state: ExactState, damping: float | Tensor) -> tuple[Operator, Tensor]:
        """Return ``(block + damping I)⁻¹``, of every unit where there is a block for each, and the damping, ``[]``."""
        like = next(x for x in optree.tree_leaves(state) if x.is_floating_point())
        dampings = (like.new_zeros(()) + damping).to(like.dtype)
        return self._of_each(lambda one: self.factor.inverse(one, damping), state.block), dampings

    def apply(self, inverse: Any, gradient: LayerMatrix) -> LayerMatrix:
        matrix = gradient.joined()
        if self.per == "unit":
            natural = vmap(lambda one, row: one.matvec(row))(inverse, matrix)
        else:
            natural = inverse.matvec(matrix.reshape(-1)).reshape(matrix.shape)
        return LayerMatrix.of(natural, gradient.bias is not None)

    def description(self) -> str:
        return f"{self.factor.description()} per {self.per}"


def unit_wise() -> ExactStructure:
    """Hold one exact block ``E[z zᵀ]`` for each output unit, ``z`` ``[d_in]`` an example's gradient of its weights.

    Scales and shifts of normalisations are represented so by default: a block of 2 × 2 numbers for each unit.

    Returns:
        A structure for ``precondition_by_fisher``.

    Examples:
        >>> import torch
        >>> from lrkfac.structures import unit_wise
        >>> tuple(unit_wise().init(2, 5, torch.zeros(())).block.matrix.shape)  # d_in, d_out
        (5, 2, 2)
    """
    return ExactStructure(dense(), "unit")


def layer_wise() -> ExactStructure:
    """Hold one exact block for each layer (for each group of a convolution), in O((d_in d_out)²) memory.

    Returns:
        A structure for ``precondition_by_fisher``.

    Examples:
        >>> import torch
        >>> from lrkfac.structures import layer_wise
        >>> tuple(layer_wise().init(2, 5, torch.zeros(())).block.matrix.shape)  # d_in, d_out
        (10, 10)
    """
    return ExactStructure(dense(), "layer")


def full() -> ExactStructure:
    """Hold the exact Fisher matrix of all covered parameters together: for small models and for comparison.

    With ``find_layers(..., uncovered="jacobian")`` these are all parameters of a model, whatever it computes.

    Returns:
        A structure for ``precondition_by_fisher``.

    Examples:
        >>> import torch, lrkfac
        >>> layers = lrkfac.find_layers(lambda p, x: x @ p, torch.ones(2, 3), torch.ones(4, 2))
        >>> print(lrkfac.explain(layers, lrkfac.structures.full()).layers[""].structure)
        dense per model
    """
    return ExactStructure(dense(), "model")
