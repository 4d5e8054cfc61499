"""Evaluations of a module by its present parameters and buffers, for an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrkfac.core.base.gathering import unshard
from lrkfac.core.base.private_torch import copy_all, version
from lrkfac.core.base.replicas import check_replicas
from lrkfac.core.base.sharding import is_sharded, local_parts, reshard
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.evaluation.evaluator import evaluator
from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.discovery import find_layers
from lrkfac.core.layers.module import check_no_hooks, from_module
from lrkfac.core.likelihoods.joint import Joint
from lrkfac.core.likelihoods.protocol import Likelihood

NORMALISATIONS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


@dataclass(frozen=True, eq=False)
class WithConstants:
    """A model of all parameters as a function of some; the others are constants, which share the module's memory."""

    model: Callable[[Tree, Any], Any]
    constants: dict[str, Tensor]

    def __call__(self, params: Tree, inputs: Any) -> Any:
        return self.model({**self.constants, **params}, inputs)


class ModuleEvaluator:
    """Evaluates batches at the module's parameters, and updates its buffers as a forward pass does.

    Args:
        module: In the mode in which it is trained.
        likelihood: Meaning of the module's outputs.
        inputs: A batch, to find the layers.
        options: Of ``evaluator``, and ``output`` of ``from_module``.
        finding: Options of ``find_layers``.
        parameters: Trained parameters of the module, by name.
    """

    layers: Layers

    def __init__(
        self,
        module: nn.Module,
        likelihood: Likelihood | Joint,
        inputs: Tree,
        options: Mapping[str, Any],
        finding: Mapping[str, Any],
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        self.module, self.parameters = module, dict(parameters)
        self.likelihood, self.options = likelihood, dict(options)
        self.output = self.options.pop("output", None)
        self.is_sharded = any(is_sharded(p) for p in self.parameters.values())
        self._gathered: tuple[list[int], dict[str, Tensor]] | None = None
        self.has_buffers = next(module.buffers(), None) is not None
        self.modes = [(name, part, part.training) for name, part in module.named_modules()]
        model = self._model()
        if self.options.get("group") is not None:
            check_replicas(self.whole, self.options["group"], "module")
        if self.has_buffers and finding["batch_axes"] is not None:
            finding = {**finding, "batch_axes": (None, finding["batch_axes"])}
        with self._naming_normalisations():
            self.layers = find_layers(model, self.whole, self._with_buffers(inputs), **finding)
        self._function: Callable[..., Evaluation] | None = self._evaluator_of(model)

    @property
    def params(self) -> dict[str, Tensor]:
        """The trained parameters by name, sharded as they are; they share memory with the module's."""
        return {name: p.detach() for name, p in self.parameters.items()}

    @property
    def whole(self) -> dict[str, Tensor]:
        """The trained parameters by name, gathered where they are sharded: once until they change."""
        if not self.is_sharded:
            return self.params
        versions = [version(p) for p in self.parameters.values()]
        if self._gathered is None or self._gathered[0] != versions:
            self._gathered = versions, unshard(self.params)
        return self._gathered[1]

    def __call__(self, inputs: Tree, targets: Tree, **requests: Any) -> Evaluation:
        """Return the evaluation of a batch; ``requests`` are the other arguments of the function of ``evaluator``.

        Raises:
            ValueError: If the module has changed, in its mode or parameters, a parameter has a hook, or as the function
                of ``evaluator``.
            TypeError: As the function of ``evaluator``.
        """
        reshard(self.module)
        self._gathered = None
        self._check_unchanged()
        if self._function is None:  # in a copy, whose function must be of its own module
            self._function = self._evaluator_of(self._model())
        with self._naming_normalisations():
            evaluation = self._function(self.whole, self._with_buffers(inputs), targets, **requests)
        if self.has_buffers:
            with torch.no_grad():
                buffers = dict(self.module.named_buffers())
                copy_all(list(buffers.values()), [evaluation.aux[name] for name in buffers])
        return evaluation

    def take(self, values: Mapping[str, Tensor]) -> None:
        """Copy values, sharded as the parameters are, into the parameters."""
        self._gathered = None
        parts = local_parts({name: (p, values[name]) for name, p in self.params.items()})
        copy_all([p for p, _ in parts.values()], [x for _, x in parts.values()])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_function": None, "_gathered": None}

    def _model(self) -> Callable[..., Any]:
        """Return the module as a function of its trained parameters."""
        model, params, *_ = from_module(self.module, self.has_buffers, self.output)
        constants = unshard({name: x for name, x in params.items() if name not in self.parameters})
        return WithConstants(model, constants) if constants else model

    def _evaluator_of(self, model: Callable[..., Any]) -> Callable[..., Evaluation]:
        return evaluator(model, self.likelihood, self.layers, has_aux=self.has_buffers, **self.options)

    def _with_buffers(self, inputs: Tree) -> Tree:
        return (dict(self.module.named_buffers()), inputs) if self.has_buffers else inputs

    @contextmanager
    def _naming_normalisations(self) -> Iterator[None]:
        """Say what to do where torch raises of a normalisation that got one value of each channel."""
        try:
            yield
        except ValueError as error:
            if not str(error).startswith("Expected more than 1"):
                raise
            names = [name for name, part, _ in self.modes if isinstance(part, NORMALISATIONS) and part.training]
            raise ValueError(
                f"inputs: {names} in train mode take mean and variance over the batch, and it has one value of each "
                f"channel ({error}); pass two examples or more, also to find the layers, or call eval() on them"
            ) from error

    def _check_unchanged(self) -> None:
        """Raise ``ValueError`` if a part is in another mode, or a parameter has been replaced or frozen."""
        for name, part, training in self.modes:
            if part.training != training:
                was, now = ("train", "eval") if training else ("eval", "train")
                raise ValueError(
                    f"module: {name or type(part).__name__!r} is in {now} mode, and was in {was} mode when the "
                    f"optimizer was made; call {was}() on it, or make the optimizer again"
                )
        present = dict(self.module.named_parameters())
        gone = [name for name, p in self.parameters.items() if present.get(name) is not p or not p.requires_grad]
        if gone:
            raise ValueError(
                f"module: {gone} have been replaced or frozen since the optimizer was made; make the optimizer again"
            )
        check_no_hooks(self.module)
