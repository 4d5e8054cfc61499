"""Natural gradient in the space of samples: an equation for each output in place of one for each parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_dtype, check_number
from lrkfac.core.base.dtypes import full_precision, wide, widest
from lrkfac.core.base.layout import with_layout_of
from lrkfac.core.base.leaves import tree_structure, tree_unflatten
from lrkfac.core.base.memory import memory_of
from lrkfac.core.base.profiling import profiled
from lrkfac.core.base.tree_checks import check_like
from lrkfac.core.base.trees import materialize
from lrkfac.core.base.types import Tree
from lrkfac.core.curvature.sample_space import OutputJacobian, residuals
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.layers.description import Layers, check_layers
from lrkfac.core.layers.statistics import Statistics
from lrkfac.core.linalg.kernels import solve_damped
from lrkfac.transforms.base import (
    GradientTransformation,
    check_evaluation,
    check_state,
    check_transformation,
    transformation,
)


class SampleSpaceState(NamedTuple):
    """State of ``precondition_in_sample_space``.

    Attributes:
        direction: The last direction, a tensor for each covered parameter; empty without momentum.
        fallback: The state of the transformation of all other parameters.
    """

    direction: tuple[Tensor, ...]
    fallback: Any

    @property
    def preconditions(self) -> bool:
        """Marks the state of a transformation that preconditions and takes the extra ``factor_damping``."""
        return True


def precondition_in_sample_space(
    layers: Layers,
    damping: float | Tensor = 1e-3,
    momentum: float | Tensor = 0.0,
    *,
    fallback: GradientTransformation | None = None,
    dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Precondition by the exact Fisher matrix of the batch, ``(F + λ I)⁻¹ ∇``, by one equation for each output.

    With ``n`` outputs (examples times numbers for each) and ``F = s Jᵀ J``, where ``J`` ``[n, p]`` is their derivative
    times the square root ``S`` of the likelihood's Hessian, and ``∇ = s Jᵀ ρ``,

        (F + λ I)⁻¹ ∇ = Jᵀ (J Jᵀ + (λ / s) I)⁻¹ ρ,    S ρ = derivative of the loss in the outputs.

    ``s`` is one over the number of examples, where all weigh the same. The kernel ``J Jᵀ`` is a sum over layers, each
    by inner products of its inputs and of the gradients at its outputs; nothing of the size ``n p`` or ``p²`` has to be
    held. It takes O(n² p + n³) operations and O(n²) memory: for fewer outputs than parameters, where
    ``structures.full()`` is out of reach. Networks that solve differential equations (ENGD-W, Guzmán-Cordero et al.
    2025, arXiv 2505.12149) and quantum states (MinSR, Chen & Heyl 2024, arXiv 2302.01941) are trained so.

    With momentum ``μ`` the direction is ``φ ← μ φ + Jᵀ (J Jᵀ + (λ / s) I)⁻¹ (ρ - μ J φ)``: what the batch says nothing
    about stays as it was (SPRING, Goldshlager, Abrahamsen & Lin 2024, arXiv 2401.10190, equation 17).

    A gradient other than the batch's, as after a weight decay, is split into a multiple of that and the rest ``v``; the
    direction of this is ``(v - Jᵀ (J Jᵀ + (λ / s) I)⁻¹ J v) / λ``.

    Each evaluation needs statistics by the estimator ``"exact"`` of all examples.

    A model that takes derivatives of a network itself (``torch.func.hessian``, ``grad``, ``jvp``), or computes with its
    parameters in another way, has no layers. With ``find_layers(..., uncovered="jacobian")`` the step is exact for it,
    too, by the gradients of all examples: ``n p`` numbers of the ``p`` parameters that no other layer covers.

    Args:
        layers: From ``find_layers``, for a model whose outputs of one example depend on no other.
        damping: ``λ > 0``, in the square of the gradient's unit. Within rounding of the largest eigenvalue, a larger
            one is taken: 4 machine precisions times ``s`` times the trace of ``J Jᵀ``.
        momentum: ``μ``, in [0, 1).
        fallback: Transformation of the parameters that no layer covers, of which there are none with
            ``uncovered="jacobian"``; by default they pass as plain gradients.
        dtype: Of the kernel and its factor, float32 or float64: by default float64 if the layers' parameters are, else
            float32. In float32, a damping below a millionth of the largest eigenvalue has no effect.

    Returns:
        A transformation with a ``SampleSpaceState``. Its ``update`` takes the extra ``evaluation``, and
        ``factor_damping`` in the place of ``damping``.

    Raises:
        ValueError: If ``damping`` is not positive and finite, ``momentum`` outside [0, 1), no layer is covered, or
            examples depend on each other; in ``update``, if the evaluation has no such statistics, the kernel does not
            fit into memory (the bytes are said), or the tree or the state are not those of ``layers``.
        TypeError: If an argument has the wrong type; in ``update``, if ``evaluation`` is missing.

    Examples:
        One step to the solution of a linear problem with fewer equations than unknowns:

        >>> import torch, lrkfac
        >>> model, params = lambda p, x: x @ p[:, None], torch.zeros(3, dtype=torch.float64)
        >>> x, y = torch.tensor([[1.0, 1, 0], [0, 1, 1]]).double(), torch.tensor([[2.0], [1.0]]).double()
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> evaluation = lrkfac.evaluator(model, lrkfac.gaussian(), layers, "exact")(params, x, y)
        >>> tx = lrkfac.precondition_in_sample_space(layers, damping=1e-12)
        >>> updates, state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
        >>> params = lrkfac.apply_updates(params, -updates)
        >>> (x @ params).round(decimals=6)
        tensor([2., 1.], dtype=torch.float64)
    """
    check_layers(layers)
    if fallback is not None:
        check_transformation(fallback, "fallback")
    if dtype is not None:
        check_dtype(dtype)
    if not layers.layers:
        raise ValueError(
            "layers: expected at least one layer, whose rows make up the kernel, got none; with "
            'find_layers(..., uncovered="jacobian") each parameter is one, whatever the model computes'
        )
    if layers.independent is False or not layers.single:
        raise ValueError(
            "layers: expected a model whose outputs of one example depend on no other and stand in one entry of their "
            "leading axis, since each row of the kernel is one output's; print(layers) says more, "
            "precondition_by_fisher(layers) does without"
        )
    return transformation(_SampleSpace(layers, damping, momentum, fallback, dtype))


@dataclass(frozen=True, eq=False)
class _SampleSpace:
    """See ``precondition_in_sample_space``, whose arguments these are."""

    layers: Layers
    damping: float | Tensor
    momentum: float | Tensor
    fallback: GradientTransformation | None
    dtype: torch.dtype | None

    def __post_init__(self) -> None:
        check_number(self.damping, "damping", 0, includes_low=False)
        check_number(self.momentum, "momentum", 0, 1)

    @property
    def remembers(self) -> bool:
        """Whether there may be momentum."""
        return isinstance(self.momentum, Tensor) or self.momentum != 0

    def init(self, params: Tree) -> SampleSpaceState:
        """Return the state before the first step."""
        leaves = check_like(self.layers.tree, params, "params")
        covered, uncovered = self._split()
        direction = tuple([torch.zeros_like(leaves[i], dtype=wide(leaves[i]).dtype) for i in covered])
        other = self.fallback.init([leaves[i] for i in uncovered]) if self.fallback else ()
        return SampleSpaceState(direction if self.remembers else (), other)

    def update(
        self,
        updates: Tree,
        state: SampleSpaceState,
        params: Tree = None,
        *,
        evaluation: Evaluation | None = None,
        factor_damping: float | Tensor | None = None,
        **extra: Any,
    ) -> tuple[Tree, SampleSpaceState]:
        """Return the preconditioned updates and the next state."""
        evaluation = check_evaluation(evaluation, "precondition_in_sample_space")
        check_state(state, SampleSpaceState)
        leaves: list[Any] = check_like(self.layers.tree, updates, "updates")
        param_leaves = None if params is None else check_like(self.layers.tree, params, "params")
        covered, uncovered = self._split()
        self._check_state(state, covered, leaves)
        statistics = self._checked(evaluation)
        dtype = self.dtype or widest(torch.float32, *[leaves[i].dtype for i in covered])
        rho = residuals(statistics).detach()
        check_memory(rho.numel(), dtype, rho.device)
        gradients = check_like(self.layers.tree, evaluation.grads, "evaluation.grads")
        own = [(materialize(leaves[i]), materialize(gradients[i])) for i in covered]
        damping = self.damping if factor_damping is None else factor_damping
        with profiled("sample space"), full_precision(statistics.scale):
            found = self._direction(statistics, rho, own, state.direction, damping, dtype)
        for i, direction in zip(covered, found, strict=True):
            leaves[i] = with_layout_of(direction.to(leaves[i].dtype), leaves[i])
        other = state.fallback
        if self.fallback:
            rest = None if param_leaves is None else [param_leaves[i] for i in uncovered]
            changed, other = self.fallback.update(
                [leaves[i] for i in uncovered], other, rest, evaluation=evaluation, **extra
            )
            for i, leaf in zip(uncovered, changed, strict=True):
                leaves[i] = leaf
        last = tuple([new.to(old.dtype) for new, old in zip(found, state.direction, strict=False)])
        return tree_unflatten(tree_structure(updates), leaves), SampleSpaceState(last, other)

    def _direction(
        self,
        statistics: Statistics,
        rho: Tensor,
        own: list[tuple[Tensor, Tensor]],
        last: tuple[Tensor, ...],
        damping: float | Tensor,
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """Return the direction of each covered parameter.

        With ``q = rest / λ + μ φ``, it is ``q + Jᵀ (J Jᵀ + (λ / s) I)⁻¹ (α ρ - J q)``: differences of large numbers
        over ``λ`` stand nowhere where the gradient is the batch's, whose rest is 0.

        Args:
            statistics: Of the batch.
            rho: Their residuals ``ρ`` ``[n]``.
            own: Of each covered parameter the update, and the gradient of the batch's loss.
            last: The last direction, or nothing.
            damping: ``λ``.
            dtype: In which to compute.
        """
        statistics = optree.tree_map(torch.Tensor.detach, statistics)
        covered, _ = self._split()
        pairs = [(u.to(dtype), g.to(dtype)) for u, g in own]
        along = torch.stack([(u * g).sum() for u, g in pairs]).sum()
        square = torch.stack([(g * g).sum() for _, g in pairs]).sum()
        share = along / torch.where(square == 0, 1, square)
        kept = [(u - share * g) / damping for u, g in pairs]
        if last:
            kept = [q + self.momentum * x.to(dtype) for q, x in zip(kept, last, strict=True)]
        jacobian = OutputJacobian.of(self.layers, statistics, dtype)
        by_index = dict(zip(covered, kept, strict=True))
        changes = jacobian.along([by_index.get(p.index) for p in self.layers.parameters])
        wanted = share * rho.to(dtype) - changes
        solved = solve_damped(jacobian.kernel(), damping / statistics.scale.to(dtype), wanted)
        back = jacobian.transposed(solved)
        return [by_index[i] + back[i].reshape(by_index[i].shape) for i in covered]

    def _split(self) -> tuple[list[int], list[int]]:
        """Return the indices of the parameters that layers cover, and those of the others."""
        every = [p.index for p in self.layers.parameters]
        return [i for i in every if i in self.layers.covered], [i for i in every if i not in self.layers.covered]

    def _check_state(self, state: SampleSpaceState, covered: list[int], leaves: list[Any]) -> None:
        expected = [tuple(leaves[i].shape) for i in covered] if self.remembers else []
        got = [tuple(x.shape) for x in state.direction]
        if expected != got:
            raise ValueError(
                f"state: expected a direction of the shapes {expected}, got {got}; pass what init() or the last "
                "update() of this transformation returned"
            )

    def _checked(self, evaluation: Evaluation) -> Statistics:
        """Return the statistics, or raise ``ValueError`` where they do not make up a kernel and its right-hand side."""
        statistics, call = evaluation.statistics, "evaluate(params, inputs, targets)"
        if statistics is None:
            raise ValueError(
                "evaluation: expected statistics, of which each step in the sample space makes its kernel, got none; "
                f"call {call} without statistics=False"
            )
        if evaluation.among is not None:
            raise ValueError(
                "evaluation: expected one of a single process, since the kernel is one of all examples, got one made "
                "with group=; use precondition_by_fisher(layers) on several processes"
            )
        missing = [layer.name for layer in self.layers if not statistics.inputs.get(layer.name)]
        if missing:
            raise ValueError(f"evaluation: expected statistics of all layers, got none of {missing}; call {call}")
        if not statistics.residuals:
            raise ValueError(
                "evaluation: expected statistics with residuals, got some without; make the evaluator with "
                f'estimator="exact" and a likelihood that has a residual, see Likelihood, and call {call} without '
                "examples="
            )
        return statistics


def check_memory(outputs: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ``ValueError`` if kernel, damped kernel and factor take more than the memory of the device."""
    if torch.compiler.is_compiling():
        return
    needed = 3 * outputs**2 * dtype.itemsize
    memory = memory_of(device)
    if memory is not None and needed > memory:
        raise ValueError(
            f"evaluation: the kernel of {outputs} outputs (examples times numbers for each) and its factor take "
            f"{needed:,} bytes, more than the {memory:,} of {device}; evaluate fewer examples, or use "
            "precondition_by_fisher(layers)"
        )
