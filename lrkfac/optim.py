"""A chain as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lrkfac.chains import low_rank_kfac
from lrkfac.core.base.arguments import check_integer
from lrkfac.core.base.dtypes import full_precision
from lrkfac.core.base.trees import materialize
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.estimators import Estimator
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.layers.custom import LayerKind
from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.module import from_module
from lrkfac.core.likelihoods.joint import Joint
from lrkfac.core.likelihoods.protocol import Likelihood
from lrkfac.loss_scaling import told_by_scaler
from lrkfac.module_evaluator import ModuleEvaluator
from lrkfac.optim_arguments import chain_gradients, fixed_options, list_params, settings_of_groups, unwrapped
from lrkfac.optim_state import Loading, Saved, note_steps, with_chain
from lrkfac.param_groups import ChainFactory, check_group, parameters_of, with_defaults
from lrkfac.pending import Pending
from lrkfac.state_dicts import carry_over
from lrkfac.transforms.base import GradientTransformation, apply_updates


class LowRankKFAC(torch.optim.Optimizer):
    """Train an ``nn.Module`` by ``low_rank_kfac`` or another chain, with the numbers of the functional loop.

    A loss does not determine the curvature, which needs the model and the likelihood. So ``step(inputs, targets)``
    replaces ``zero_grad``, forward pass, backward pass and ``step``. To change ``.grad`` before the step, as
    ``clip_grad_norm_`` does, or to accumulate micro-batches, call ``evaluate(inputs, targets)`` first, once or several
    times, and ``step()`` afterwards.

    The evaluation runs under the ``torch.autocast`` around it, but the linear algebra does not. bfloat16 needs no
    ``GradScaler``; with one, ``.grad`` is not scaled, and a step with infinity or NaN is skipped. Each evaluation
    updates buffers, such as BatchNorm's, as a forward pass does.

    Each step reads ``lr`` from ``param_groups``, so ``torch.optim.lr_scheduler`` works; also ``momentum`` and
    ``weight_decay`` where the transformation takes them, as a tree where groups differ.
    ``copy.deepcopy((module, optimizer))``, ``pickle`` and ``torch.save`` work; pending evaluations and hooks are lost.

    Args:
        module: In the mode (``train`` or ``eval``) in which it is trained; see ``from_module``. For
            ``DistributedDataParallel``, the wrapped module and its group are used.
        likelihood: Required: the meaning of the module's outputs.
        inputs: Required: a batch, to find the layers; a tuple is passed as positional, a mapping as keyword arguments.
        lr: Learning rate, for a transformation that takes one.
        params: Parameters, or groups as optimizers of torch take them, ``[{"params": net.head.parameters(), "lr":
            0.1, "weight_decay": 0.0}, ...]``. Parameters in no group are constant. By default all that require a
            gradient.
        transformation: ``transformation(layers, lr, **options)``, or without ``lr`` if none is passed: ``kfac``,
            ``adaptive_low_rank_kfac``, or a custom function. Its ``lr`` is a schedule that returns the current number
            in ``param_groups``, or a tree of schedules.
        estimator: See ``evaluator``.
        samples: See ``evaluator``.
        thin: See ``evaluator``; by default on for lrkfac's own chains on one process. It affects only ``step``:
            ``evaluate`` materializes all gradients.
        output: See ``from_module``.
        kinds: Custom layer kinds, see ``find_layers``.
        batch_axes: Of ``inputs``, see ``find_layers``.
        uncovered: See ``find_layers``.
        statistics_every: Number of steps from one evaluation with statistics to the next.
        group: Processes that each evaluate a part of every batch; see ``evaluator``.
        **options: For the transformation, such as ``rank=16, damping=1e-3``.

    Attributes:
        transformation: The chain.
        chain_state: Its state; ``chain_state[-1].average`` are the averaged parameters of ``adaptive_low_rank_kfac``.

    Raises:
        ValueError: If a number is out of range, or as ``from_module``, ``find_layers`` and ``evaluator``.
        TypeError: If an argument has the wrong type, is missing or unknown.

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
    _pending: Pending
    _step_supports_amp_scaling = True

    def __init__(
        self,
        module: nn.Module,
        likelihood: Likelihood | Joint = None,  # type: ignore[assignment]
        inputs: Tree = None,
        lr: float | Tensor | None = None,
        *,
        params: Iterable[Any] | None = None,
        transformation: Callable[..., GradientTransformation] = low_rank_kfac,
        estimator: Estimator = "mc",
        samples: int = 1,
        thin: bool | None = None,
        output: str | int | None = None,
        kinds: Sequence[LayerKind] = (),
        batch_axes: Tree | None = None,
        uncovered: Literal["plain", "jacobian"] = "plain",
        statistics_every: int = 10,
        group: Any = None,
        **options: Any,
    ) -> None:
        module, group = unwrapped(module, group, likelihood=likelihood, inputs=inputs)
        groups = None if params is None else list_params(params)
        defaults, known = settings_of_groups(transformation, lr, groups, options, LowRankKFAC)
        check_integer(statistics_every, "statistics_every")
        _, trainable = from_module(module, output=output)
        evaluation = {"estimator": estimator, "samples": samples, "output": output, "group": group}
        evaluation |= chain_gradients(transformation, thin, group, options)
        self._module, self._pending = module, Pending()
        finding = {"kinds": kinds, "batch_axes": batch_axes, "uncovered": uncovered}
        self._make_evaluator = partial(ModuleEvaluator, module, likelihood, inputs, evaluation, finding)
        fixed = fixed_options(transformation, options, defaults)
        self._make_chain = ChainFactory(self, partial(transformation, **fixed), known)
        everything = [p for name, p in module.named_parameters() if name in trainable]
        super().__init__(everything if groups is None else groups, defaults)
        self._describe()
        self.statistics_every = statistics_every
        self.chain_state = self.transformation.init(self._evaluator.whole)
        self._progress = {"steps": 0, "statistics since": 0}
        self.steps = 0

    @property
    def layers(self) -> Layers:
        """The module's layers, as ``find_layers`` returns them."""
        return self._evaluator.layers

    @property
    def params(self) -> dict[str, Tensor]:
        """The trained parameters by name; they share memory with the module's."""
        return self._evaluator.params

    @property
    def steps(self) -> int:
        """Number of steps so far."""
        return self._progress["steps"]

    @steps.setter
    def steps(self, number: int) -> None:
        self._progress["steps"] = number
        note_steps(self.state, self.param_groups, number)

    def evaluate(self, inputs: Tree, targets: Tree, statistics: bool | None = None, **selection: Any) -> Evaluation:
        """Evaluate a batch, set each ``.grad`` to a copy of its gradient, and keep the evaluation for ``step()``.

        Evaluations since the last step accumulate: they make one batch, as by ``merge_evaluations``, and ``.grad``
        becomes the mean over all its examples (of ``.grad`` as it is, clipped or not, and the new gradient).
        ``zero_grad()`` drops them.

        Args:
            inputs: Of the batch.
            targets: As the likelihood takes them.
            statistics: Whether to take statistics; by default in the first of each ``statistics_every`` steps, and
                wherever ``layers`` are named.
            **selection: ``layers`` and ``examples``, see ``evaluator``.

        Returns:
            The evaluation of this batch alone.

        Raises:
            ValueError: If the module has changed, in its mode or parameters; if ``.grad`` is there, but not by
                ``evaluate``; if parameters have changed since evaluations that wait; or as ``evaluator()``.
            TypeError: As the function of ``evaluator``.
        """
        self._pending.prepare()
        evaluation = self._evaluate(inputs, targets, statistics, selection)
        evaluation = evaluation._replace(grads=materialize(evaluation.grads))
        self._pending.add(evaluation)
        return evaluation

    def step(  # type: ignore[override]
        self, closure: Any = None, targets: Any = None, statistics: bool | None = None, **selection: Any
    ) -> Tensor:
        """Change the parameters: ``step(inputs, targets)``, ``step(closure)``, or ``step()`` after ``evaluate``.

        Where ``evaluate`` was called since the last step, gradients are ``.grad`` as it is now, also for what
        ``merge_evaluations`` makes of all these evaluations.

        Args:
            closure: The inputs of a batch, or a function that returns an ``Evaluation``; one that calls ``evaluate``
                may return anything, such as the loss, and ``None`` stands for the evaluations that wait.
            targets: Of the batch.
            statistics: For a batch, as in ``evaluate``; likewise ``selection``.
            **selection: As in ``evaluate``.

        Returns:
            The loss before the step, ``[]``.

        Raises:
            TypeError: If the closure returns something else, or there is neither batch, closure nor pending evaluation.
            ValueError: If a ``.grad`` is missing; if evaluations that wait would be lost; if a ``GradScaler`` has
                unscaled ``.grad``; or as ``evaluate`` and the transformation.
        """
        with told_by_scaler(vars(self), evaluates=closure is not None) as overflow:
            if targets is None:
                evaluation = self._pending.of_closure(closure, bool(selection) or statistics is not None)
            else:
                self._pending.check_free()
                evaluation = self._evaluate(closure, targets, statistics, selection)
            if overflow:
                self._pending.restart(self._evaluator.parameters)
                return evaluation.loss
            if self._make_chain.has_changed():
                self.transformation = self._make_chain(self.layers, self._evaluator.parameters)
            params, whole = self.params, self._evaluator.whole
            with torch.no_grad(), full_precision(evaluation.loss):
                updates, self.chain_state = self.transformation.update(
                    evaluation.grads, self.chain_state, whole, evaluation=evaluation
                )
                self._evaluator.take(apply_updates(params, updates))
            self.steps += 1
            self._pending.restart(self._evaluator.parameters)
        return evaluation.loss

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and containers, which ``torch.load(..., weights_only=True)`` reads."""
        saved = Saved(self.chain_state, self.steps, self._progress["statistics since"])
        with self.register_state_dict_post_hook(lambda _, packed: with_chain(saved, packed), prepend=True):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the optimizer of a ``state_dict`` was.

        Raises:
            ValueError: If it is of another module, transformation or class of optimizer; nothing has changed then.
            TypeError: If it is no dictionary.
        """
        loaded = Loading(self.chain_state, self.param_groups, state_dict)
        # After what users have registered before loading, and before what they have registered after it.
        before = self.register_load_state_dict_pre_hook(loaded.take)
        with before, self.register_load_state_dict_post_hook(lambda _: self._continue(loaded.saved), prepend=True):
            super().load_state_dict(state_dict)

    def _continue(self, saved: Saved) -> None:
        self.param_groups[:] = [with_defaults(group, self.defaults) for group in self.param_groups]
        self.chain_state, self._progress["statistics since"], self.steps = saved.state, saved.started, saved.steps
        self._pending.restart(self._evaluator.parameters)

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
            self.chain_state = carry_over(self.transformation.init(self._evaluator.whole), self.chain_state)
            self._progress["statistics since"] = self.steps
            self.steps = self.steps  # of the new parameters, too

    def __getstate__(self) -> dict[str, Any]:
        # Schedulers replace `step` by a function that is bound to this very optimizer.
        return {n: x for n, x in vars(self).items() if n not in ("step", "_pending") and not n.endswith("_hooks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it, and no group of ours may set it
        if not hasattr(self, "_pending"):
            self._pending = Pending()
            self._pending.restart(self._evaluator.parameters)

    def _evaluate(self, inputs: Tree, targets: Tree, statistics: bool | None, selection: dict[str, Any]) -> Evaluation:
        if statistics is None:
            due = (self.steps - self._progress["statistics since"]) % self.statistics_every == 0
            statistics = due or selection.get("layers") is not None
        return self._evaluator(inputs, targets, statistics=statistics, **selection)

    def _describe(self) -> None:
        """Find the layers of the parameters in the groups, and make their evaluator and chain."""
        evaluator = self._make_evaluator(parameters_of(self._module, self.param_groups))
        self.transformation = self._make_chain(evaluator.layers, evaluator.parameters)
        self._evaluator = evaluator
        self._pending.restart(evaluator.parameters)
