"""A minimum to many digits, which posteriors and influence functions presuppose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Params = dict[str, Tensor]


def minimum(objective: Callable[[Params], Tensor], start: Params, iterations: int = 300) -> Params:
    """Return the parameters at which L-BFGS, from ``start``, has made the objective of all examples least."""
    params = {name: x.detach().clone().requires_grad_() for name, x in start.items()}
    optimizer = torch.optim.LBFGS(
        list(params.values()),
        max_iter=iterations,
        history_size=30,
        tolerance_grad=1e-7,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(params)
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    return {name: x.detach() for name, x in params.items()}


def squared_length(params: Params) -> Tensor:
    """Return the squared length of all parameters, ``[]``."""
    return torch.stack([x.square().sum() for x in params.values()]).sum()
