"""What a user's typed code may write: checked by mypy, strictly, and run by the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lrkfac

Params = dict[str, Tensor]


def model(params: Params, inputs: Tensor) -> Tensor:
    return torch.tanh(inputs @ params["w"].mT) @ params["v"].mT


def trained(steps: int) -> tuple[Params, Tensor]:
    """By pure functions."""
    params: Params = {"w": torch.randn(8, 4), "v": torch.randn(3, 8)}
    inputs, targets = torch.randn(16, 4), torch.randint(0, 3, (16,))
    layers: lrkfac.Layers = lrkfac.find_layers(model, params, inputs)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator="mc")
    structure = {
        "w": lrkfac.structures.kronecker(lrkfac.structures.low_rank(2), lrkfac.structures.dense()),
        "*": lrkfac.structures.unit_wise(),
    }
    tx: lrkfac.GradientTransformation = lrkfac.chain(
        lrkfac.precondition_by_fisher(layers, structure, damping=1e-2),
        lrkfac.trace(0.9),
        lrkfac.scale_by_learning_rate(lrkfac.schedules.exponential_decay(0.1, 1, 0.9)),
    )
    state, loss = tx.init(params), torch.zeros(())
    for step in range(steps):
        evaluation: lrkfac.Evaluation = evaluate(params, inputs, targets, statistics=step % 2 == 0)
        updates, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        params = lrkfac.apply_updates(params, updates)
        loss = evaluation.loss
    return params, loss


def trained_module(net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """By the optimizer."""
    optimizer = lrkfac.LowRankKFAC(net, lrkfac.categorical(), inputs, lr=0.1, rank=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    loss = optimizer.step(inputs, targets)
    scheduler.step()
    return loss


def own_transformation(factor: float) -> lrkfac.GradientTransformation:
    """One of one's own."""

    def update(
        updates: Params, state: tuple[()], params: Params | None = None, **extra: object
    ) -> tuple[Params, tuple[()]]:
        return {name: factor * x for name, x in updates.items()}, state

    return lrkfac.GradientTransformation(lambda params: (), update)


def inverted(operator: lrkfac.linalg.LowRankPlusDiagonal) -> Tensor:
    return lrkfac.linalg.to_dense(lrkfac.linalg.inverse(operator, damping=0.1))
