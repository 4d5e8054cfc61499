"""By how much the dampings of the quadratic model may change, and when."""

from __future__ import annotations

import torch
from torch import Tensor

from lrkfac.transforms.quadratic_options import QuadraticModelOptions
from lrkfac.transforms.quadratic_state import Chosen, QuadraticModelState


def candidates(options: QuadraticModelOptions, state: QuadraticModelState) -> tuple[Tensor, Tensor]:
    """Return ``γ`` and ``λ``, ``[3]`` each, among which the model chooses: larger ones, the last, smaller ones.

    ``λ`` goes with ``γ`` at the start alone.
    """
    extra = _extra(options, state)
    change = options.damping_decay ** (state.since + 1).to(extra) * extra
    one = torch.ones_like(change)
    around, start = torch.stack([1 / change, one, change]), torch.stack([1 / extra, one, extra])
    return bounded(options, state.factor_damping * around), bounded(options, state.damping * start)


def misled(options: QuadraticModelOptions, state: QuadraticModelState, chosen: Chosen, ratio: Tensor) -> Tensor:
    """Return whether a step is undone since it is poor and the start chose much smaller dampings for it."""
    large = _extra(options, state) < options.damping_decay**options.max_steps
    return options.reject & large & (chosen.factor_damping < state.factor_damping) & (ratio < options.lower_threshold)


def adapted(
    options: QuadraticModelOptions,
    state: QuadraticModelState,
    chosen: Chosen,
    ratio: Tensor,
    squares: Tensor,
    noise: Tensor,
    accepted: Tensor,
    back: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return ``λ`` and ``γ`` after a step ``δ`` with statistics, ``δᵀδ = squares``, by its reduction ratio.

    ``λ`` falls while it matters. Where ``λ δᵀδ`` is far below the curvature ``δᵀFδ``, lower values change nothing until
    the model fails, and ``λ`` would then take hundreds of steps to return. Without ``noise`` the batch's model is that
    of the next ones, and does not fail.

    Both stay where they were where the step goes ``back`` since the model was misled. Where it was undone for another
    reason, what is raised is the last ``λ``, not the one that the model chose.
    """
    steps = (options.damping_interval * (state.since + 1)).clamp(max=options.max_steps)
    change, one = options.damping_decay ** steps.to(ratio.dtype), torch.ones_like(ratio)
    due = (state.refreshes + 1) % options.damping_interval == 0
    # The model of a step is its slope and half of its curvature, damping included.
    curvature = 2 * (chosen.value - chosen.slope)
    matters = chosen.damping * squares >= options.damping_share * noise * curvature
    falls, rises = due & matters & (ratio > options.upper_threshold), due & (ratio < options.lower_threshold)
    factor = torch.where(falls, change, torch.where(rises, 1 / change, one))
    damping = torch.where(accepted, bounded(options, chosen.damping * factor), raised(options, state.damping))
    return torch.where(back, state.damping, damping), torch.where(back, state.factor_damping, chosen.factor_damping)


def raised(options: QuadraticModelOptions, damping: Tensor) -> Tensor:
    """Return ``λ`` after a step that was undone."""
    return bounded(options, options.rejection_factor * damping)


def bounded(options: QuadraticModelOptions, damping: Tensor) -> Tensor:
    """Return a damping within its bounds."""
    return damping.clamp(options.min_damping, options.max_damping)


def _extra(options: QuadraticModelOptions, state: QuadraticModelState) -> Tensor:
    """Return the factor by which dampings may change at the start beside that of the steps."""
    return options.damping_decay ** (options.start_steps * options.start_decay ** state.refreshes.to(state.damping))
