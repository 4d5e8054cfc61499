"""Muon in float32."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # torch's


class Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) without weight decay.

    torch's own rounds to bfloat16. On a CPU that has no instructions for it, a product of width 1024 then takes
    hundreds of times as long as in float32.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the parameters along the nearest semi-orthogonal matrix of Nesterov's average of gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                average = state.setdefault("momentum_buffer", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                rate = group["lr"] * math.sqrt(max(1, p.shape[0] / p.shape[1]))
                p.add_(orthogonalized(p.grad.lerp(average, group["momentum"])), alpha=-rate)


def orthogonalized(matrix: Tensor) -> Tensor:
    """A matrix with the same singular vectors and singular values near 1, by Newton and Schulz's iteration."""
    a, b, c = COEFFICIENTS
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrix.shape[0] <= matrix.shape[1] else x.mT
