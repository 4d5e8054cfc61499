"""A problem of ``time_to_loss``: a model to train, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lrkfac

Params = dict[str, Tensor]

EVALUATED_AT_ONCE = 2000


@dataclass(frozen=True)
class Problem:
    """A model to train.

    Attributes:
        title: Heads table and picture.
        model: ``model(params, inputs) -> outputs``; with buffers, ``model(params, (buffers, inputs))`` returns
            ``(outputs, buffers)``.
        likelihood: What the outputs mean.
        init: ``seed -> params``.
        inputs: Training inputs, the batch axis first.
        targets: Training targets.
        batch_size: Examples per step, unless another is asked for.
        steps: The same of steps.
        sgd_rate: Centre of the grid of SGD's learning rates, the only ones that depend on the unit of the loss.
        floor: A lower bound of the loss, from which the picture's axis starts.
        target: The loss to be reached, where the problem names one.
        replacement: Whether batches are drawn with replacement; else each epoch sees every example once.
        evaluated: The loss is that of every so-manieth training example.
        by_adam: Parameters that Muon leaves to Adam, beside vectors.
        buffers: Of BatchNorm, at the start.
        judged: The model in evaluation mode, in the form of ``model``, where that is another function.
        test_inputs: What the model does not train on, where there is such.
        test_targets: Their classes.
    """

    title: str
    model: Callable[[Any, Any], Any]
    likelihood: lrkfac.Likelihood
    init: Callable[[int], Any]
    inputs: Tensor
    targets: Tensor
    batch_size: int
    steps: int
    sgd_rate: float
    floor: float = 0.0
    target: float | None = None
    replacement: bool = False
    evaluated: int = 1
    by_adam: tuple[str, ...] = ()
    buffers: Params | None = None
    judged: Callable[[Any, Any], Any] | None = None
    test_inputs: Tensor | None = None
    test_targets: Tensor | None = None

    def batches(self, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Indices of examples, the same for every method."""
        generator = torch.Generator().manual_seed(seed)
        while self.replacement:
            yield torch.randint(len(self.inputs), (batch_size,), generator=generator)
        if batch_size > len(self.inputs):
            raise ValueError(f"batch size: expected at most {len(self.inputs)} examples, got {batch_size}")
        while True:
            order = torch.randperm(len(self.inputs), generator=generator)
            yield from order[: len(order) // batch_size * batch_size].split(batch_size)

    def argument(self, inputs: Tensor, buffers: Params | None = None) -> Any:
        """What the model takes: the inputs, beside buffers (those of the start, unless others are given)."""
        return inputs if self.buffers is None else (buffers or self.buffers, inputs)

    def outputs(self, params: Any, inputs: Tensor, buffers: Params | None = None) -> Any:
        """The outputs by which the model is judged."""
        result = (self.judged or self.model)(params, self.argument(inputs, buffers))
        return result if self.buffers is None else result[0]

    @torch.no_grad()
    def loss(self, params: Any, buffers: Params | None = None) -> float:
        """The training loss, in nats per term."""
        total = terms = 0.0
        inputs, targets = self.inputs[:: self.evaluated], self.targets[:: self.evaluated]
        pairs = zip(inputs.split(EVALUATED_AT_ONCE), targets.split(EVALUATED_AT_ONCE), strict=True)
        for some_inputs, some_targets in pairs:
            outputs = self.outputs(params, some_inputs, buffers)
            negative = self.likelihood.negative_log_likelihood(outputs, some_targets)
            total, terms = total + negative.double().sum().item(), terms + negative.numel()
        return total / terms

    @torch.no_grad()
    def accuracy(self, params: Any, buffers: Params | None = None) -> float | None:
        """The share of test examples whose class is the likeliest one; ``None`` where there are none."""
        if self.test_inputs is None or self.test_targets is None:
            return None
        parts = zip(self.test_inputs.split(EVALUATED_AT_ONCE), self.test_targets.split(EVALUATED_AT_ONCE), strict=True)
        right = sum((self.outputs(params, x, buffers).argmax(1) == y).sum().item() for x, y in parts)
        return right / len(self.test_inputs)
