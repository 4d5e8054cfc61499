"""A chain as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from lrkfac.chains import adaptive_low_rank_kfac, kfac, low_rank_kfac
from lrkfac.core.base.arguments import check_function, check_integer, check_number
from lrkfac.core.base.dtypes import without_autocast
from lrkfac.core.base.private_torch import copy_all, required_option
from lrkfac.core.base.trees import materialize
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.estimators import Estimator
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.evaluation.evaluator import evaluator
from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.discovery import find_layers
from lrkfac.core.layers.module import from_module
from lrkfac.core.likelihoods.joint import Joint
from lrkfac.core.likelihoods.protocol import Likelihood
from lrkfac.param_groups import OfGroups, check_group, check_module, defaults, filled, function_of, listed
from lrkfac.state_dicts import carried_over, from_state_dict, state_dict
from lrkfac.transforms.base import GradientTransformation, apply_updates

CHAIN = "chain"
"""Key of the state of the chain in the state of the optimizer."""


class LowRankKFAC(torch.optim.Optimizer):
    """``low_rank_kfac``, or another chain, for an ``nn.Module``: the functional loop, with the same numbers.

    Curvature needs the model and the likelihood, a loss alone does not tell it: ``step(inputs, targets)`` takes the
    place of ``zero_grad``, forward and backward pass, and ``step``. To work on ``.grad`` in between, as
    ``clip_grad_norm_`` does,

        ``loss = optimizer.evaluate(inputs, targets).loss; clip_grad_norm_(net.parameters(), 1.0); optimizer.step()``.

    The evaluation runs under the ``torch.autocast`` around it, the linear algebra never does. bfloat16 needs no
    ``GradScaler``, and there is nothing that one could scale. Buffers, such as BatchNorm's, are updated by each
    evaluation, as by a forward pass.

    Of ``param_groups``, ``lr`` is read in each step, so that ``torch.optim.lr_scheduler`` works, ``momentum`` and
    ``weight_decay``, too, where the transformation takes them. What differs between groups is handed to it as a tree:
    the functional loop is that of ``low_rank_kfac(layers, {"body.weight": 0.01, "head.weight": 0.1})``.

    Attributes:
        layers: The layers that were found.
        transformation: The chain.
        chain_state: Its state; ``chain_state[-1].average`` are the averaged parameters of ``adaptive_low_rank_kfac``.
        steps: Number of steps so far.
    """

    layers: Layers
    transformation: GradientTransformation
    _parameters: dict[str, nn.Parameter]
    _held: Evaluation | None

    def __init__(
        self,
        module: nn.Module,
        likelihood: Likelihood | Joint,
        inputs: Tree,
        lr: float | Tensor | None = None,
        *,
        params: Iterable[Any] | None = None,
        transformation: Callable[..., GradientTransformation] = low_rank_kfac,
        estimator: Estimator = "mc",
        samples: int = 1,
        thin: bool | None = None,
        statistics_every: int = 10,
        **options: Any,
    ) -> None:
        """Finds the layers of a module, and makes the chain.

        Args:
            module: In the mode (``train`` or ``eval``) in which it is trained; see ``from_module``.
            likelihood: What its outputs mean.
            inputs: Of a batch, to find the layers; a tuple is spread as positional, a dictionary as keyword arguments.
            lr: Learning rate, for a transformation that takes one.
            params: Parameters, or groups as optimizers of torch take them, ``[{"params": net.head.parameters(), "lr":
                0.1, "weight_decay": 0.0}, ...]``. What is in none is constant. By default all that require a gradient.
            transformation: ``transformation(layers, lr, **options)``, or without ``lr`` if none is given, such as
                ``kfac``, or ``adaptive_low_rank_kfac`` without ``lr``; or one's own function. It is handed ``lr`` as a
                schedule that returns the number that stands in ``param_groups`` just then, or a tree of schedules.
            estimator: See ``evaluator``.
            samples: See ``evaluator``.
            thin: See ``evaluator``; on by default where the transformation is one of lrkfac's, because no lazy gradient
                reaches the user: ``evaluate`` materializes all gradients, ``step(inputs, targets)`` hands none out.
            statistics_every: Statistics are taken in the first of so many steps, unless a step says otherwise.
            **options: For the transformation, such as ``rank=16, damping=1e-3``.

        Raises:
            ValueError: If a number is out of range, or as ``from_module``, ``find_layers`` and ``evaluator``.
            TypeError: If an argument has the wrong type or is missing.
        """
        groups = None if params is None else listed(params)
        given = defaults(transformation, lr, options)
        if lr is None and any(isinstance(group, dict) and "lr" in group for group in groups or ()):
            given["lr"] = required_option()
        if "lr" not in given and transformation in (low_rank_kfac, kfac):
            raise TypeError("lr: missing; pass a number, or transformation=adaptive_low_rank_kfac, which needs none")
        if "lr" in given and transformation is adaptive_low_rank_kfac:
            raise TypeError("lr: adaptive_low_rank_kfac finds its own step sizes and takes none, nor does a group")
        check_integer(statistics_every, "statistics_every")
        check_function(transformation, "transformation", "a function that makes a GradientTransformation, such as kfac")
        if lr is not None:
            check_number(lr, "lr", 0)
        _, trained = from_module(module)
        self._buffered = next(module.buffers(), None) is not None
        self._module, self._inputs = module, inputs
        thin = transformation in (low_rank_kfac, kfac, adaptive_low_rank_kfac) if thin is None else thin
        self._evaluator = partial(
            evaluator, likelihood=likelihood, estimator=estimator, samples=samples, has_aux=self._buffered, thin=thin
        )
        fixed = {name: value for name, value in options.items() if name not in given}
        self._make = OfGroups(lambda: self.param_groups, partial(transformation, **fixed), given)
        everything = [p for name, p in module.named_parameters() if name in trained]
        super().__init__(everything if groups is None else groups, given)
        self._describe()
        self.statistics_every = statistics_every
        self.chain_state = self.transformation.init(self.params)
        self.steps = self._started = 0

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters as a tree of the functions; it shares memory with the module's."""
        return {name: p.detach() for name, p in self._parameters.items()}

    def evaluate(
        self,
        inputs: Tree,
        targets: Tree,
        statistics: bool | None = None,
        layers: tuple[str, ...] | None = None,
        examples: Tensor | None = None,
    ) -> Evaluation:
        """Evaluates a batch, sets each ``.grad`` to a copy of its gradient, and holds it for ``step()``.

        Args:
            inputs: Of the batch.
            targets: As the likelihood takes them.
            statistics: Whether to take statistics; by default in the first of each ``statistics_every`` steps, and
                wherever ``layers`` are named.
            layers: Names of the layers of which to take statistics, all by default; see ``round_robin_refresh``.
            examples: Numbers of the examples of which to take statistics, int64 ``[n]``, all by default.

        Returns:
            The evaluation; of several, ``merge_evaluations`` makes one.

        Raises:
            ValueError: If the module has changed, in its mode or parameters, or as the function of ``evaluator``.
            TypeError: As the function of ``evaluator``.
        """
        evaluation = self._evaluate(inputs, targets, statistics, layers, examples)
        evaluation = evaluation._replace(grads=materialize(evaluation.grads))
        for name, parameter in self._parameters.items():
            # A copy: several parameters may have the same gradient, and each may be changed in place.
            parameter.grad = evaluation.grads[name].clone()
        self._held = evaluation
        return evaluation

    @overload  # type: ignore[override]
    def step(self) -> Tensor: ...
    @overload
    def step(self, closure: Callable[[], Evaluation]) -> Tensor: ...
    @overload
    def step(
        self,
        closure: Tree,
        targets: Tree,
        statistics: bool | None = None,
        layers: tuple[str, ...] | None = None,
        examples: Tensor | None = None,
    ) -> Tensor: ...
    def step(
        self,
        closure: Any = None,
        targets: Any = None,
        statistics: bool | None = None,
        layers: tuple[str, ...] | None = None,
        examples: Tensor | None = None,
    ) -> Tensor:
        """``step(inputs, targets)``, ``step(closure)``, or ``step()`` after ``evaluate``: changes the parameters.

        Gradients are those of the evaluation; if it is the one that ``evaluate`` returned last, ``.grad`` as it is now.

        Args:
            closure: A function that returns an ``Evaluation``, or the inputs of a batch.
            targets: Of the batch.
            statistics: For a batch, as in ``evaluate``.
            layers: For a batch, as in ``evaluate``.
            examples: For a batch, as in ``evaluate``.

        Returns:
            The loss before the step, ``[]``.

        Raises:
            TypeError: If the closure returns something else, such as a loss, which does not tell the curvature; if
                there is neither batch nor closure, nor an evaluation held.
            ValueError: If a ``.grad`` is missing, or as ``evaluate`` and the transformation.
        """
        if targets is None and (statistics, layers, examples) != (None, None, None):
            raise TypeError(
                "step: statistics are chosen by evaluate(), or for a batch: step(inputs, targets, statistics)"
            )
        if targets is not None:
            evaluation = self._evaluate(closure, targets, statistics, layers, examples)
        elif closure is None:
            if self._held is None:
                raise TypeError(
                    "step: nothing to step with; call step(inputs, targets), or evaluate(inputs, targets) first"
                )
            evaluation = self._held
        else:
            evaluation = closure() if callable(closure) else closure
            if not isinstance(evaluation, Evaluation):
                raise TypeError(
                    f"step: expected a closure that returns an Evaluation, got {type(evaluation).__name__}; a loss "
                    "does not tell the curvature: call step(inputs, targets), or "
                    "step(lambda: optimizer.evaluate(inputs, targets))"
                )
        if evaluation is self._held:
            absent = [name for name, p in self._parameters.items() if p.grad is None]
            if absent:
                raise ValueError(
                    f"step: {absent} have no .grad any more; call zero_grad() before evaluate(), or not at all"
                )
            evaluation = evaluation._replace(grads={name: p.grad for name, p in self._parameters.items()})
        if self._make.has_changed():
            self.transformation = self._make(self.layers, self._parameters)
        params = self.params
        with torch.no_grad(), without_autocast(evaluation.loss):
            updates, self.chain_state = self.transformation.update(
                evaluation.grads, self.chain_state, params, evaluation=evaluation
            )
            copy_all(list(params.values()), list(apply_updates(params, updates).values()))
        self.steps += 1
        self._held = None
        return evaluation.loss

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and containers: ``torch.load(..., weights_only=True)`` reads them."""
        self.state[CHAIN] = {"state": state_dict(self.chain_state), "steps": self.steps, "started": self._started}  # type: ignore[index]
        try:
            return super().state_dict()
        finally:
            self.state.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the optimizer of a ``state_dict`` was.

        Raises:
            ValueError: If it is of another module, transformation or class of optimizer; nothing has changed then.
            TypeError: If it is no dictionary.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict: expected that of a LowRankKFAC, got {type(state_dict).__name__}")
        held = state_dict.get("state", {}).get(CHAIN)
        if held is None:
            raise ValueError("state_dict: expected that of a LowRankKFAC, got one of another optimizer")
        sizes, here = ([len(g["params"]) for g in groups] for groups in (state_dict["param_groups"], self.param_groups))
        if sizes != here:
            raise ValueError(f"state_dict: expected groups of {here} parameters, got {sizes}; make the optimizer alike")
        state = from_state_dict(self.chain_state, held["state"])
        super().load_state_dict(state_dict)
        self.param_groups[:] = [filled(group, self.defaults) for group in self.param_groups]
        self.state.clear()
        self.chain_state, self.steps, self._held = state, held["steps"], None
        self._started = held.get("started", 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters of the module that were constant so far, such as a part that was frozen.

        Layers are found again; of those that were there, the state is kept. The next evaluation takes statistics.

        Raises:
            ValueError: If a parameter is not the module's, is in a group already, or requires no gradient; if the group
                sets something else than ``lr``, ``momentum`` and ``weight_decay``, or as ``find_layers`` and the
                transformation. Nothing has changed then.
            TypeError: If it is no dictionary, or a value has the wrong type.
        """
        super().add_param_group(filled(param_group, self.defaults if self.param_groups else {}))
        try:
            check_group(self.param_groups[-1], self._module, self.defaults)
            if hasattr(self, "chain_state"):
                self._describe()
        except Exception:
            self.param_groups.pop()
            raise
        if hasattr(self, "chain_state"):
            self.chain_state = carried_over(self.transformation.init(self.params), self.chain_state)
            self._started = self.steps

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("LowRankKFAC: functions cannot be pickled or copied; make another one, and load_state_dict()")

    def _evaluate(
        self,
        inputs: Tree,
        targets: Tree,
        statistics: bool | None,
        layers: tuple[str, ...] | None,
        examples: Tensor | None,
    ) -> Evaluation:
        check_module(self._module, self._parameters, self._modes)
        if statistics is None:
            statistics = layers is not None or (self.steps - self._started) % self.statistics_every == 0
        evaluation = self._fisher(
            self.params, self._with_buffers(inputs), targets, statistics=statistics, layers=layers, examples=examples
        )
        if self._buffered:
            with torch.no_grad():
                own = dict(self._module.named_buffers())
                copy_all(list(own.values()), [evaluation.aux[name] for name in own])
        return evaluation

    def _with_buffers(self, inputs: Tree) -> Tree:
        return (dict(self._module.named_buffers()), inputs) if self._buffered else inputs

    def _describe(self) -> None:
        """Finds the layers of what is in the groups, and makes the chain."""
        model, params = function_of(self._module, self.param_groups, self._buffered)
        layers = find_layers(model, params, self._with_buffers(self._inputs))
        evaluate = self._evaluator(model, layers=layers)
        own = {name: p for name, p in self._module.named_parameters() if name in params}
        self.transformation = self._make(layers, own)
        self.layers, self._fisher, self._parameters, self._held = layers, evaluate, own, None
        self._modes = [(name, part, part.training) for name, part in self._module.named_modules()]
