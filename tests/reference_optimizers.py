"""Plain-loop references for the transformations of gradients and the schedules; never imports lrkfac.

Gradients, parameters and updates are flat dictionaries of tensors. A function of a list returns the list of
what comes out after each step. Updates point along the gradient: the minus sign comes with the learning rate.
"""

import math

import torch

from tests.cases import Params


def momentum_trace(gradients: list[Params], decay: float, nesterov: bool = False) -> list[Params]:
    """t = g + decay * t from t = 0; the update is t, or g + decay * t (the new t) with Nesterov."""
    trace = {name: torch.zeros_like(g) for name, g in gradients[0].items()}
    updates = []
    for step in gradients:
        trace = {name: g + decay * trace[name] for name, g in step.items()}
        updates.append({name: g + decay * trace[name] if nesterov else trace[name] for name, g in step.items()})
    return updates


def decayed_weights_added(updates: Params, params: Params, weight_decay: float) -> Params:
    """u + weight_decay * w for every parameter w (decoupled: after preconditioning)."""
    return {name: u + weight_decay * params[name] for name, u in updates.items()}


def clipped_by_global_norm(updates: Params, max_norm: float) -> Params:
    """u * min(1, max_norm / ‖u‖), ‖u‖ the Euclidean norm over all entries of all parameters."""
    norm = math.sqrt(sum(float((u**2).sum()) for u in updates.values()))
    factor = min(1.0, max_norm / norm) if norm > 0 else 1.0
    return {name: factor * u for name, u in updates.items()}


def clipped_by_kl(updates: Params, gradients: Params, learning_rate: float, kl_clip: float) -> Params:
    """u * min(1, √(kl_clip / (lr² Σ u·g))), the sum over all entries of all parameters; u where it is not positive."""
    inner = sum(float((u * gradients[name]).sum()) for name, u in updates.items())
    factor = min(1.0, math.sqrt(kl_clip / (learning_rate**2 * inner))) if inner > 0 else 1.0
    return {name: factor * u for name, u in updates.items()}


def warmup_cosine_decay_schedule(
    step: int, peak: float, warmup_steps: int, total_steps: int, initial: float = 0.0, final: float = 0.0
) -> float:
    """Linear from initial (step 0) to peak (warmup_steps), then half a cosine to final (total_steps) and constant."""
    if step < warmup_steps:
        return initial + (peak - initial) * step / warmup_steps
    fraction = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return final + (peak - final) * (1 + math.cos(math.pi * fraction)) / 2


def exponential_decay(step: int, initial: float, rate: float, interval: int = 1) -> float:
    return initial * rate ** (step / interval)


def piecewise_constant_schedule(step: int, boundaries: list[int], values: list[float]) -> float:
    """values[i] with i the number of boundaries that are ≤ step (boundaries ascending)."""
    return values[sum(boundary <= step for boundary in boundaries)]
