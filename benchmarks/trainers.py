"""One step of training: by a chain of lrkfac, or by an optimizer of ``torch.optim`` on leaf tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import optree
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import lrkfac
from benchmarks.common import tree_bytes
from benchmarks.problem import Problem


@dataclass(frozen=True)
class Setup:
    """What a trainer starts from. ``refresh`` is the number of steps between statistics."""

    problem: Problem
    params: Any
    layers: lrkfac.Layers
    seed: int
    steps: int
    rank: int
    refresh: int
    compiled: bool


class Trainer(Protocol):
    """Parameters and the way they are trained."""

    def warm_up(self, inputs: Tensor, targets: Tensor) -> None:
        """Compiles, or first calls, what a step consists of, and changes nothing."""
        ...

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One step on a batch."""
        ...

    def params(self) -> Any:
        """The parameters now, a tree as the model takes it."""
        ...

    def buffers(self) -> Any:
        """Those of the model as the last step left them; ``None`` where it has none."""
        ...

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state, beside parameters and gradients."""
        ...


class Functional:
    """Training by a gradient transformation; compiled, the whole step is one graph.

    ``read(params, state)`` are the parameters to be judged, by default those that are trained.
    """

    def __init__(
        self,
        setup: Setup,
        transformation: lrkfac.GradientTransformation,
        read: Callable[[Any, Any], Any] = lambda params, state: params,
    ) -> None:
        problem = setup.problem
        has_aux = problem.buffers is not None
        evaluate = lrkfac.evaluator(problem.model, problem.likelihood, setup.layers, has_aux=has_aux)

        def step(
            params: Any, state: Any, inputs: Any, targets: Tensor, noise: Tensor | None, statistics: bool
        ) -> tuple[Any, Any, Any]:
            evaluation = evaluate(params, inputs, targets, statistics, noise=noise)
            updates, state = transformation.update(evaluation.grads, state, params, evaluation=evaluation)
            return lrkfac.apply_updates(params, updates), state, evaluation.aux

        self._step = torch.compile(step, fullgraph=True) if setup.compiled else step
        self._params, self._state = setup.params, transformation.init(setup.params)
        self._refresh, self._count = setup.refresh, 0
        self._noise = torch.Generator().manual_seed(setup.seed)
        self._read, self._argument, self._buffers = read, problem.argument, problem.buffers
        self._terms = problem.outputs(setup.params, problem.inputs[:1]).shape[1:]

    def warm_up(self, inputs: Tensor, targets: Tensor) -> None:
        noise = torch.full((1, len(inputs), *self._terms), 0.5, device=inputs.device)
        for some, statistics in ((noise, True), (None, False)):
            self._step(self._params, self._state, self._argument(inputs), targets, some, statistics)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        statistics = self._count % self._refresh == 0
        noise = None
        if statistics:
            noise = torch.rand(1, len(inputs), *self._terms, generator=self._noise).to(inputs.device)
        self._params, self._state, self._buffers = self._step(
            self._params, self._state, self._argument(inputs, self._buffers), targets, noise, statistics
        )
        self._count += 1

    def params(self) -> Any:
        return self._read(self._params, self._state)

    def buffers(self) -> Any:
        return self._buffers

    def state_bytes(self) -> int:
        return tree_bytes(self._state)


class Leaves:
    """Training by ``torch.optim``: the parameters are leaf tensors, kernels flattened to matrices."""

    def __init__(
        self, setup: Setup, make: Callable[[dict[str, Tensor]], list[Optimizer]], cosine: bool = False
    ) -> None:
        paths, leaves, structure = optree.tree_flatten_with_path(setup.params)
        flat = [leaf.flatten(1) if leaf.ndim > 2 else leaf for leaf in leaves]
        self._leaves = [leaf.detach().clone().requires_grad_() for leaf in flat]
        self._tree = optree.tree_unflatten(structure, self._leaves)
        self._like = setup.params
        problem = setup.problem
        self._argument, self._buffers = problem.argument, problem.buffers

        def loss(tree: Any, inputs: Any, targets: Tensor) -> tuple[Tensor, Any]:
            result = problem.model(reshaped(tree, setup.params), inputs)
            outputs, buffers = (result, None) if problem.buffers is None else result
            return problem.likelihood.negative_log_likelihood(outputs, targets).mean(), buffers

        self._loss = torch.compile(loss, fullgraph=True) if setup.compiled else loss
        names = [".".join(map(str, path)) for path in paths]
        self._optimizers = make(dict(zip(names, self._leaves, strict=True)))
        self._schedulers = []
        if cosine:
            self._schedulers = [
                LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / setup.steps, 1))))
                for optimizer in self._optimizers
            ]

    def warm_up(self, inputs: Tensor, targets: Tensor) -> None:
        self._loss(self._tree, self._argument(inputs), targets)[0].backward()

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        loss, self._buffers = self._loss(self._tree, self._argument(inputs, self._buffers), targets)
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
        for scheduler in self._schedulers:
            scheduler.step()

    def params(self) -> Any:
        return reshaped(optree.tree_map(torch.detach, self._tree), self._like)

    def buffers(self) -> Any:
        return self._buffers

    def state_bytes(self) -> int:
        own = {leaf.data_ptr() for leaf in self._leaves}
        found: dict[int, int] = {}
        for optimizer in self._optimizers:
            _collect(list(optimizer.state.values()), found)
        return sum(size for pointer, size in found.items() if pointer not in own)


def reshaped(tree: Any, like: Any) -> Any:
    """The leaves in the shapes of those of another tree."""
    return optree.tree_map(lambda leaf, other: leaf.view(other.shape), tree, like)


def _collect(value: Any, found: dict[int, int]) -> None:
    """Adds the bytes of every tensor within, by address; pytorch-optimizer keeps some in objects of its own."""
    if isinstance(value, Tensor):
        found[value.data_ptr()] = value.numel() * value.element_size()
    elif isinstance(value, dict):
        _collect(list(value.values()), found)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _collect(part, found)
    elif type(value).__module__.startswith("pytorch_optimizer"):
        _collect(vars(value), found)
