"""The vocabulary of structures: protocols of factor and block structures, of their states and their statistics.

A structure is a frozen description with pure functions of a state; a state is a NamedTuple of tensors. A factor
structure sees a factor only through a ``Covariance`` and never learns what layer it came from. A block structure
receives the statistics of a layer as ``BlockStatistics``, and its gradient as a ``LayerMatrix``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import optree
import torch
from torch import Tensor

from lrkfac.core.curvature.joining import APART, Joining
from lrkfac.core.curvature.solving import Solving
from lrkfac.core.curvature.spectra import Spectrum
from lrkfac.core.layers.description import Layer, Treatment
from lrkfac.core.layers.matrix import LayerMatrix
from lrkfac.core.linalg.covariances import Covariance, KroneckerFactors
from lrkfac.core.linalg.eigen import without_subnormal
from lrkfac.core.linalg.inverses import damped_inverse
from lrkfac.core.linalg.moments import Moments
from lrkfac.core.linalg.operators import Operator, mean_eigenvalue


class FactorState(Protocol):
    """State of a factor structure: a NamedTuple of tensors that describes the average in it.

    ``spectrum`` and ``inner`` serve ``diagnose``, ``ranks_by_trace`` and ``factor_drift``. Optional are
    ``operator()``, the average as an operator, which ``curvature.from_state`` needs;
    ``damped(inverse, damping, eigenvalues)``, by default from the eigenvalues; ``squared_distance(other)``, by default
    from inner products; and a property ``fixed_basis``, true where no choice of a rank changes the representation.
    """

    @property
    def steps(self) -> Tensor:
        """Number of batches in the average, int64 ``[]``; groups and units have leading axes."""
        ...

    def spectrum(self) -> Spectrum | tuple[Tensor, Tensor]:
        """Return eigenvalues ``[r]``, largest first, and the trace that they leave out, ``[]``."""
        ...

    def inner(self, other: Any) -> Tensor:
        """Return the Frobenius inner product ``tr(M N)`` with another state, ``[*]`` over leading axes."""
        ...


class FactorStructure(Solving, ABC):
    """Define how one factor is represented, averaged over time and inverted.

    Subclass it, as a frozen dataclass, for a custom structure, and give it to ``kronecker``. Required are ``init``,
    ``update`` and ``operator``; ``inverse``, too, where the operator is none of ``lrkfac.linalg``. States are
    NamedTuples of tensors with a count ``steps`` and methods ``spectrum()`` and ``inner(other)``; see ``FactorState``.
    ``explain`` calls the methods with tensors on the device "meta". ``lrkfac.testing.check_structure`` checks the laws.

    On several processes each has a covariance of its own rows, and the factor is that of their sum. Whatever ``update``
    asks of the covariance is summed over processes, one call for each question. Instead of ``update``, a structure may
    give ``rounds`` and ``begin``, ``measure`` and ``advance``, of which ``update`` then consists: the answers of all
    layers in one round then go into one call. ``question`` says what of its carry others need to answer.

    Attributes:
        stackable: Whether all methods also take states of several factors, stacked along leading axes; where they do
            not, several are mapped over by ``vmap``.
        stands_alone: Whether it may represent the whole block of a layer outside ``kronecker``.

    Examples:
        >>> import lrkfac
        >>> isinstance(lrkfac.structures.dense(), lrkfac.structures.FactorStructure)
        True
    """

    stands_alone: ClassVar[bool] = False

    @property
    def stackable(self) -> bool:
        """Whether states may have leading axes."""
        return False

    def fitted(self, dimension: int) -> FactorStructure:
        """Return the structure to use for a ``[d, d]`` factor: by default itself, else a smaller and exact one."""
        return self

    @abstractmethod
    def init(self, dimension: int, like: Tensor) -> Any:
        """Return the state before the first batch, in the dtype (at least float32) and on the device of ``like``."""

    @property
    def rounds(self) -> int:
        """Number of rounds of questions to the covariance in an update; 0 where ``update`` is not made of rounds."""
        return 0

    def begin(self, state: Any, decay: float | Tensor) -> Any:
        """Return what the first round starts from: a NamedTuple of tensors, by default the state."""
        return state

    def question(self, carry: Any, round: int) -> Any:
        """Return those tensors of a carry that ``measure`` looks at in a round, at least one; by default all.

        Where processes divide the layers, they travel from the owner of a layer to all others.
        """
        return carry

    def measure(self, question: Any, covariance: Covariance, round: int) -> Any:
        """Return the answer of the covariance, a tree of tensors linear in it: answers of processes add up."""
        raise NotImplementedError

    def advance(self, carry: Any, answers: Any, round: int) -> Any:
        """Return what the next round starts from, and after the last one the state."""
        raise NotImplementedError

    def update(self, state: Any, covariance: Covariance, decay: float | Tensor) -> Any:
        """Return the state after one more batch."""
        if not self.rounds:
            raise NotImplementedError(
                f"{type(self).__name__}: expected a method update(), or rounds with begin(), measure() and advance()"
            )
        carry = self.begin(state, decay)
        for round in range(self.rounds):
            answers = self.measure(self.question(carry, round), covariance, round)
            carry = self.advance(carry, answers, round)
        return carry

    @abstractmethod
    def operator(self, state: Any) -> Operator:
        """Return the running average, positive semi-definite."""

    def mean_eigenvalue(self, state: Any) -> Tensor:
        """Return the mean eigenvalue of the running average, ``[*]``; by default from ``operator``."""
        return mean_eigenvalue(self.operator(state))

    def inverse(self, state: Any, damping: float | Tensor) -> Operator:
        """Return ``(running average + damping I)⁻¹``, positive definite; by default from ``operator``."""
        return damped_inverse(self.operator(state), damping)

    def basis(self, state: Any) -> Tensor:
        """Return orthonormal eigenvectors ``[d, r]`` for EKFAC; by default all ``d`` of the dense matrix."""
        matrix = self.operator(state).to_dense()
        return torch.linalg.eigh(without_subnormal(matrix)).eigenvectors.contiguous()

    def size(self, dimension: int) -> int:
        """Return the number of floating-point numbers in state and inverse; by default of both, made on "meta"."""
        state = self.init(dimension, torch.empty((), device="meta"))
        leaves = optree.tree_leaves((state, self.inverse(state, 1.0)))
        return sum(x.numel() for x in leaves if x.is_floating_point())

    def description(self) -> str:
        """Return the structure in words, for tables; by default the name of its class."""
        return type(self).__name__


class BlockStatistics(Protocol):
    """Statistics of a batch for one block: each structure asks for what it needs."""

    def kronecker_factors(self, treatment: Treatment) -> KroneckerFactors:
        """Return the covariances ``B`` and ``A``; over all processes, where there are several."""
        ...

    def kronecker_parts(self, treatment: Treatment) -> tuple[KroneckerFactors, ...]:
        """Return the parts of ``B`` and ``A`` that this process has, of each way to use the weight."""
        ...

    def summed(self, covariance: Covariance) -> Covariance:
        """Return the sum of a covariance over processes, where there are several."""
        ...

    def moments(self, output_vectors: Tensor, input_vectors: Tensor) -> Moments:
        """Return the second moments of the gradients of single examples along orthonormal columns."""
        ...

    def example_gradients(self) -> Tensor:
        """Return the gradients of single examples, ``[n, d_out, d_in]``."""
        ...

    @property
    def scale(self) -> Tensor:
        """Weight of each example in sums over them, ``[]``."""
        ...


class BlockStructure(Solving, ABC):
    """How a layer's block of the Fisher matrix is represented.

    Attributes:
        is_product: Whether it is a Kronecker product, which scales and shifts are not.
        joins_layers: Whether one block holds all layers.
        needs_gradients: Whether it cannot do without gradients at the layer's outputs.
        needs_examples: Whether it needs what belongs to single examples.
        needs_independence: Whether it is right only where examples do not depend on each other.
        keeps_rows: Whether ``apply`` takes gradients that are lazy matrices.
        form: Article and adjective of its blocks in an error message.
    """

    is_product: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = True
    keeps_rows: ClassVar[bool] = False
    form: ClassVar[str] = "an exact"

    @property
    def joins_layers(self) -> bool:
        """Whether one block holds all layers."""
        return False

    @property
    def needs_examples(self) -> bool:
        """Whether it needs what belongs to single examples."""
        return True

    @property
    def needs_independence(self) -> bool:
        """Whether it is right only where examples do not depend on each other."""
        return False

    @property
    def mappable(self) -> bool:
        """Whether blocks of equal layers are refreshed together, by ``vmap`` unless ``stackable``."""
        return False

    @property
    def stackable(self) -> bool:
        """Whether ``update_from`` and ``damped_inverse`` take states with a leading axis, without ``vmap``."""
        return False

    @property
    def joining(self) -> Joining:
        """How several blocks of layers without groups are applied together."""
        return APART

    def for_layer(self, layer: Layer) -> BlockStructure:
        """Return the structure to use for a layer."""
        return self.fitted(layer.d_in, layer.d_out)

    @abstractmethod
    def fitted(self, d_in: int, d_out: int) -> BlockStructure:
        """Return the structure to use for a layer of this size."""

    @abstractmethod
    def init(self, d_in: int, d_out: int, like: Tensor) -> Any:
        """Return the state before the first batch."""

    @abstractmethod
    def update_from(self, state: Any, statistics: BlockStatistics, decay: float | Tensor) -> Any:
        """Return the state after one more batch."""

    @property
    @abstractmethod
    def rounds(self) -> int:
        """Number of rounds in which an update asks; 0 where a factor is updated in no rounds."""

    @abstractmethod
    def begin(self, state: Any, decay: float | Tensor) -> Any:
        """Return what the first round starts from."""

    @abstractmethod
    def question(self, carry: Any, round: int) -> Any:
        """Return those tensors of a carry that ``measure`` looks at in a round, at least one."""

    @abstractmethod
    def measure(self, question: Any, statistics: BlockStatistics, round: int) -> Any:
        """Return the answer of the part of the statistics that this process has: answers add up."""

    @abstractmethod
    def advance(self, carry: Any, answers: Any, round: int) -> Any:
        """Return what the next round starts from, and after the last one the state that ``update_from`` returns."""

    @abstractmethod
    def operator(self, state: Any) -> Operator:
        """Return the running average."""

    def mean_eigenvalue(self, state: Any) -> Tensor:
        """Return the mean eigenvalue of the running average, ``[*]``."""
        return mean_eigenvalue(self.operator(state))

    @abstractmethod
    def damped_inverse(self, state: Any, damping: float | Tensor) -> tuple[Any, Tensor]:
        """Return the damped inverse, and the dampings in it: ``δ_B`` and ``δ_A``, ``[2]``, or ``λ``, ``[]``."""

    def inverse(self, state: Any, damping: float | Tensor) -> Any:
        """Return the damped inverse alone."""
        return self.damped_inverse(state, damping)[0]

    @abstractmethod
    def apply(self, inverse: Any, gradient: LayerMatrix) -> LayerMatrix:
        """Return the natural gradient of a layer, or of several as ``joining`` has joined them."""

    def size(self, d_in: int, d_out: int) -> int | None:
        """Return the number of floating-point numbers in state, inverse and dampings, where a formula says."""
        return None

    @abstractmethod
    def description(self) -> str:
        """Return the structure in words."""
