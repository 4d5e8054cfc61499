"""A chain as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrkfac.chains import adaptive_low_rank_kfac, kfac, low_rank_kfac
from lrkfac.core.base.arguments import check_function, check_integer, check_number
from lrkfac.core.base.dtypes import without_autocast
from lrkfac.core.base.private_torch import copy_all
from lrkfac.core.base.trees import materialize
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.estimators import Estimator
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.module import from_module
from lrkfac.core.likelihoods.joint import Joint
from lrkfac.core.likelihoods.protocol import Likelihood
from lrkfac.module_evaluator import ModuleEvaluator
from lrkfac.param_groups import (
    CHAIN,
    ChainFactory,
    check_group,
    group_defaults,
    list_params,
    parameters_of,
    saved_chain,
    with_defaults,
)
from lrkfac.state_dicts import carry_over, from_state_dict, state_dict
from lrkfac.transforms.base import GradientTransformation, apply_updates


class LowRankKFAC(torch.optim.Optimizer):
    """Train an ``nn.Module`` by ``low_rank_kfac`` or another chain, with the numbers of the functional loop.

    A loss alone does not tell the curvature, which needs the model and the likelihood. So ``step(inputs, targets)``
    takes the place of ``zero_grad``, forward pass, backward pass and ``step``. To change ``.grad`` before the step, as
    ``clip_grad_norm_`` does, call ``evaluate(inputs, targets)`` first and ``step()`` afterwards.

    The evaluation runs under the ``torch.autocast`` around it, the linear algebra never does. bfloat16 needs no
    ``GradScaler``. Each evaluation updates buffers, such as BatchNorm's, as a forward pass does.

    Each step reads ``lr`` from ``param_groups``, so ``torch.optim.lr_scheduler`` works; also ``momentum`` and
    ``weight_decay`` where the transformation takes them. It gets values that differ between groups as a tree, as in
    ``low_rank_kfac(layers, {"body.weight": 0.01, "head.weight": 0.1})``.

    ``copy.deepcopy``, ``pickle`` and ``torch.save`` work; copy ``(module, optimizer)`` together to keep them joined. A
    pending ``evaluate`` and hooks do not travel, as with other optimizers of torch.

    Args:
        module: In the mode (``train`` or ``eval``) in which it is trained; see ``from_module``.
        likelihood: Meaning of the module's outputs.
        inputs: A batch, to find the layers; a tuple is spread as positional, a mapping as keyword arguments.
        lr: Learning rate, for a transformation that takes one.
        params: Parameters, or groups as optimizers of torch take them, ``[{"params": net.head.parameters(), "lr":
            0.1, "weight_decay": 0.0}, ...]``. Parameters in no group are constant. By default all that require a
            gradient.
        transformation: ``transformation(layers, lr, **options)``, or without ``lr`` if none is passed: ``kfac``,
            ``adaptive_low_rank_kfac``, or a custom function. Its ``lr`` is a schedule that returns the current number
            in ``param_groups``, or a tree of schedules.
        estimator: See ``evaluator``.
        samples: See ``evaluator``.
        thin: See ``evaluator``; by default on for lrkfac's own chains. It concerns ``step(inputs, targets)`` alone:
            ``evaluate`` materializes all gradients.
        output: See ``from_module``.
        statistics_every: Number of steps from one evaluation with statistics to the next.
        **options: For the transformation, such as ``rank=16, damping=1e-3``.

    Attributes:
        transformation: The chain.
        chain_state: Its state; ``chain_state[-1].average`` are the averaged parameters of ``adaptive_low_rank_kfac``.
        steps: Number of steps so far.

    Raises:
        ValueError: If a number is out of range, or as ``from_module``, ``find_layers`` and ``evaluator``.
        TypeError: If an argument has the wrong type or is missing.

    Examples:
        >>> import torch, lrkfac
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> inputs, targets = torch.randn(16, 3), torch.randint(2, (16,))
        >>> optimizer = lrkfac.LowRankKFAC(net, lrkfac.categorical(), inputs, lr=0.1, rank=4)
        >>> losses = [float(optimizer.step(inputs, targets)) for _ in range(5)]
        >>> losses[-1] < losses[0], optimizer.steps
        (True, 5)
    """

    transformation: GradientTransformation
    _evaluator: ModuleEvaluator
    _pending: Evaluation | None

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
        output: str | int | None = None,
        statistics_every: int = 10,
        **options: Any,
    ) -> None:
        groups = None if params is None else list_params(params)
        defaults = group_defaults(transformation, lr, options)
        known = list(defaults)
        if lr is None and any(isinstance(group, dict) and "lr" in group for group in groups or ()):
            known = ["lr", *defaults]
        if "lr" not in known and transformation in (low_rank_kfac, kfac):
            raise TypeError("lr: missing; pass a number, or transformation=adaptive_low_rank_kfac, which needs none")
        if "lr" in known and transformation is adaptive_low_rank_kfac:
            raise TypeError("lr: adaptive_low_rank_kfac finds its own step sizes and takes none, nor does a group")
        check_integer(statistics_every, "statistics_every")
        check_function(transformation, "transformation", "a function that makes a GradientTransformation, such as kfac")
        if lr is not None:
            check_number(lr, "lr", 0)
        _, trainable = from_module(module, output=output)
        thin = transformation in (low_rank_kfac, kfac, adaptive_low_rank_kfac) if thin is None else thin
        evaluator_options = {"estimator": estimator, "samples": samples, "thin": thin, "output": output}
        self._module, self.statistics_every = module, statistics_every
        self._make_evaluator = partial(ModuleEvaluator, module, likelihood, inputs, evaluator_options)
        fixed = {name: value for name, value in options.items() if name not in defaults}
        self._make_chain = ChainFactory(self, partial(transformation, **fixed), known)
        everything = [p for name, p in module.named_parameters() if name in trainable]
        super().__init__(everything if groups is None else groups, defaults)
        self._describe()
        self.chain_state, self.steps, self._statistics_since = self.transformation.init(self.params), 0, 0

    @property
    def layers(self) -> Layers:
        """The module's layers, as ``find_layers`` returns them."""
        return self._evaluator.layers

    @property
    def params(self) -> dict[str, Tensor]:
        """The trained parameters by name; they share memory with the module's."""
        return self._evaluator.params

    def evaluate(self, inputs: Tree, targets: Tree, statistics: bool | None = None, **selection: Any) -> Evaluation:
        """Evaluate a batch, set each ``.grad`` to a copy of its gradient, and keep the evaluation for ``step()``.

        Args:
            inputs: Of the batch.
            targets: As the likelihood takes them.
            statistics: Whether to take statistics; by default in the first of each ``statistics_every`` steps, and
                wherever ``layers`` are named.
            **selection: ``layers`` and ``examples``, see ``evaluator``.

        Returns:
            The evaluation; ``merge_evaluations`` makes one of several.

        Raises:
            ValueError: If the module has changed, in its mode or parameters, or as the function of ``evaluator``.
            TypeError: As the function of ``evaluator``.
        """
        evaluation = self._evaluate(inputs, targets, statistics, selection)
        evaluation = evaluation._replace(grads=materialize(evaluation.grads))
        for name, parameter in self._evaluator.parameters.items():
            # A copy: several parameters may have the same gradient, and each may be changed in place.
            parameter.grad = evaluation.grads[name].clone()
        self._pending = evaluation
        return evaluation

    def step(  # type: ignore[override]
        self, closure: Any = None, targets: Any = None, statistics: bool | None = None, **selection: Any
    ) -> Tensor:
        """Change the parameters: ``step(inputs, targets)``, ``step(closure)``, or ``step()`` after ``evaluate``.

        The gradients are the evaluation's. Of the one that ``evaluate`` returned last, they are ``.grad`` as it is now.

        Args:
            closure: A function that returns an ``Evaluation``, or the inputs of a batch.
            targets: Of the batch.
            statistics: For a batch, as in ``evaluate``; likewise ``selection``.
            **selection: As in ``evaluate``.

        Returns:
            The loss before the step, ``[]``.

        Raises:
            TypeError: If the closure returns something else, such as a loss, which does not tell the curvature; if
                there is neither batch, closure nor pending evaluation.
            ValueError: If a ``.grad`` is missing, or as ``evaluate`` and the transformation.
        """
        evaluation = self._evaluation_for_step(closure, targets, statistics, selection)
        if self._make_chain.has_changed():
            self.transformation = self._make_chain(self.layers, self._evaluator.parameters)
        params = self.params
        with torch.no_grad(), without_autocast(evaluation.loss):
            updates, self.chain_state = self.transformation.update(
                evaluation.grads, self.chain_state, params, evaluation=evaluation
            )
            copy_all(list(params.values()), list(apply_updates(params, updates).values()))
        self.steps += 1
        self._pending = None
        return evaluation.loss

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and containers, which ``torch.load(..., weights_only=True)`` reads."""
        chain = {"state": state_dict(self.chain_state), "steps": self.steps, "started": self._statistics_since}
        self.state[CHAIN] = chain  # type: ignore[index]
        try:
            return super().state_dict()
        finally:
            self.state.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the optimizer of a ``state_dict`` was.

        Raises:
            ValueError: If it is of another module, transformation or class of optimizer; nothing has changed then.
            TypeError: If it is no dictionary.
        """
        chain = saved_chain(state_dict, self.param_groups)
        state = from_state_dict(self.chain_state, chain["state"])
        super().load_state_dict(state_dict)
        self.param_groups[:] = [with_defaults(group, self.defaults) for group in self.param_groups]
        self.state.clear()
        self.chain_state, self.steps, self._pending = state, chain["steps"], None
        self._statistics_since = chain.get("started", 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the module that were constant so far, such as a part that was frozen.

        The layers are found again, and those that were there keep their state. The next evaluation takes statistics.

        Raises:
            ValueError: If a parameter is not the module's, is in a group already, or requires no gradient; if the group
                sets something else than ``lr``, ``momentum`` and ``weight_decay``, or as ``find_layers`` and the
                transformation. Nothing has changed then.
            TypeError: If it is no dictionary, or a value has the wrong type.
        """
        is_built = hasattr(self, "chain_state")
        super().add_param_group(with_defaults(param_group, self.defaults if self.param_groups else {}))
        try:
            check_group(self.param_groups[-1], self._module, self._make_chain.known)
            if is_built:
                self._describe()
        except Exception:
            self.param_groups.pop()
            raise
        if is_built:
            self.chain_state = carry_over(self.transformation.init(self.params), self.chain_state)
            self._statistics_since = self.steps

    def __getstate__(self) -> dict[str, Any]:
        # Schedulers replace `step` by a function that is bound to this very optimizer.
        state = {n: x for n, x in vars(self).items() if n != "step" and not n.endswith("_hooks")}
        return {**state, "_pending": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it, and no group of ours may set it

    def _evaluation_for_step(
        self, closure: Any, targets: Any, statistics: bool | None, selection: dict[str, Any]
    ) -> Evaluation:
        if targets is None and (selection or statistics is not None):
            raise TypeError(
                "step: statistics are chosen by evaluate(), or for a batch: step(inputs, targets, statistics)"
            )
        if targets is not None:
            return self._evaluate(closure, targets, statistics, selection)
        if closure is None and self._pending is None:
            raise TypeError(
                "step: nothing to step with; call step(inputs, targets), or evaluate(inputs, targets) first"
            )
        evaluation = self._pending if closure is None else closure() if callable(closure) else closure
        if not isinstance(evaluation, Evaluation):
            raise TypeError(
                f"step: expected a closure that returns an Evaluation, got {type(evaluation).__name__}; a loss "
                "does not tell the curvature: call step(inputs, targets), or "
                "step(lambda: optimizer.evaluate(inputs, targets))"
            )
        if evaluation is self._pending:
            evaluation = evaluation._replace(grads=self._evaluator.gradients())
        return evaluation

    def _evaluate(self, inputs: Tree, targets: Tree, statistics: bool | None, selection: dict[str, Any]) -> Evaluation:
        if statistics is None:
            due = (self.steps - self._statistics_since) % self.statistics_every == 0
            statistics = due or selection.get("layers") is not None
        return self._evaluator(inputs, targets, statistics=statistics, **selection)

    def _describe(self) -> None:
        """Find the layers of the parameters in the groups, and make their evaluator and chain."""
        evaluator = self._make_evaluator(parameters_of(self._module, self.param_groups))
        self.transformation = self._make_chain(evaluator.layers, evaluator.parameters)
        self._evaluator, self._pending = evaluator, None
