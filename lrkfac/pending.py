"""The evaluations of an optimizer since its last step, which make one batch, and their gradient in ``.grad``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn

from lrkfac.core.base.gathering import unshard
from lrkfac.core.base.private_torch import version, weak_reference
from lrkfac.core.base.sharding import shard_like
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.evaluation.merging import mean, merge_evaluations, merged_from

Mark = tuple[Callable[[], Tensor | None], int]
"""A tensor as it was: a reference that does not keep it alive, and how often it had been changed in place."""


class Part(NamedTuple):
    """One evaluation that waits for the step.

    Attributes:
        evaluation: Without its gradients, which are in ``.grad``.
        gradients: Marks of its gradients, to tell whether an evaluation still has them.
    """

    evaluation: Evaluation
    gradients: list[Mark]


class Pending:
    """Evaluations since the last step; never replaced, so that wrappers of an optimizer share it.

    Each ``.grad`` is the mean over the examples of all parts, with what has been done to it in between.

    Attributes:
        parts: The evaluations.
        number: How many there have been in all.
        parameters: Trained parameters, by name.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.number = 0
        self.restart({})

    def restart(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Forget all parts, for these parameters from now on; what is in ``.grad`` may be replaced."""
        self.parameters = dict(parameters)
        self.parts.clear()
        self._mark()

    def check_free(self) -> None:
        """Raise ``ValueError`` if evaluations wait for a step."""
        self._drop_if_cleared()
        if self.parts:
            raise ValueError(
                f"step: {len(self.parts)} evaluations since the last step wait in .grad, and a step with other ones "
                "would lose them; call step() without arguments to use them, evaluate() to add to them, or zero_grad() "
                "to drop them"
            )

    def prepare(self) -> None:
        """Raise ``ValueError`` where one more evaluation cannot be merged, or would replace gradients of others."""
        self._drop_if_cleared()
        if not self.parts:
            if foreign := self._foreign():
                raise ValueError(
                    f"evaluate: {foreign} have a .grad that is not of evaluate(), which would replace it; call "
                    "zero_grad() first, and add other gradients after evaluate()"
                )
            return
        self.gradients("evaluate")
        moved = [name for name, p in self.parameters.items() if version(p) != self.versions[name]]
        if moved:
            raise ValueError(
                f"evaluate: {moved} have changed since the evaluations that wait for step(); evaluations at different "
                "parameters make no batch: call step(), or zero_grad() to drop them"
            )

    def add(self, evaluation: Evaluation) -> None:
        """Merge an evaluation; each ``.grad`` becomes the mean over the examples of all parts."""
        grads: dict[str, Tensor] = shard_like(self.parameters, evaluation.grads)
        with torch.no_grad():
            if self.parts:
                weights = torch.stack([*[part.evaluation.weight for part in self.parts], evaluation.weight])
                shares = [weights[:-1].sum() / weights.sum(), weights[-1] / weights.sum()]
                present = self.gradients("evaluate")
                for name, merged in mean(shares, [present, grads]).items():
                    present[name].copy_(merged)
            else:
                for name, parameter in self.parameters.items():
                    # A copy: several parameters may have the same gradient, and each may be changed in place.
                    parameter.grad = grads[name].clone()
        self.parts.append(Part(evaluation._replace(grads={}), _marks(optree.tree_leaves(evaluation.grads))))
        self.number += 1
        self._mark()

    def whole(self) -> Evaluation:
        """Return the evaluation of all parts; its gradients are ``.grad`` as it is now.

        Raises:
            TypeError: If there is none.
            ValueError: If a ``.grad`` is missing, or parts do not fit each other.
        """
        if not self.parts:
            if foreign := self._foreign():
                raise TypeError(
                    f"step: expected evaluations, got {foreign} with the .grad of another backward pass; a loss does "
                    "not tell the curvature: in place of forward pass, loss and backward(), call evaluate(inputs, "
                    "targets), in Lightning and in the Trainer of transformers within training_step"
                )
            raise TypeError(
                "step: nothing to step with; call step(inputs, targets), or evaluate(inputs, targets) first"
            )
        parts, grads = [part.evaluation for part in self.parts], unshard(self.gradients("step"))
        return (parts[0] if len(parts) == 1 else merge_evaluations(parts))._replace(grads=grads)

    def of_closure(self, closure: Any, chooses: bool) -> Evaluation:
        """Return the evaluation to step with: of a closure, as it is passed, or ``whole`` where there is neither.

        Args:
            closure: As ``step`` takes it.
            chooses: Whether the step chooses statistics, which have been taken or not already.

        Raises:
            TypeError: If it does, or if the closure returns anything else and does not call ``evaluate``.
            ValueError: As ``whole`` and ``resolved``.
        """
        if chooses:
            raise TypeError("step: statistics are chosen by evaluate(), or by step(inputs, targets, statistics)")
        number = self.number
        result = closure() if callable(closure) else closure
        is_new = self.number > number
        if isinstance(result, Evaluation):
            return self.resolved(result, is_new)
        if result is None or is_new:
            return self.whole()
        raise TypeError(
            f"step: expected a closure that returns an Evaluation, got {type(result).__name__}; a loss does not tell "
            "the curvature: call step(inputs, targets), or step(lambda: optimizer.evaluate(inputs, targets)); where a "
            "framework makes the closure, as Lightning, call evaluate(inputs, targets) in its training_step"
        )

    def resolved(self, evaluation: Evaluation, is_new: bool) -> Evaluation:
        """Return the evaluation to step with, where one is passed.

        One that is made of all parts has ``.grad`` for its gradients, as ``whole`` has. One made by other means is
        passed as it is.

        Args:
            evaluation: Of ``evaluate``, of ``merge_evaluations``, or any other.
            is_new: Whether it was made by ``evaluate`` in the closure that returned it: it then stands for all parts.

        Raises:
            ValueError: If it leaves out parts, or both its gradients and ``.grad`` have been changed.
        """
        made_of, merged_grads = merged_from(evaluation)
        losses = [id(part.evaluation.loss) for part in self.parts]
        numbers = [losses.index(id(one.loss)) if id(one.loss) in losses else -1 for one in made_of]
        if max(numbers) < 0:
            self.check_free()
            return evaluation
        stands_for_all = is_new and numbers == [len(losses) - 1]
        if sorted(numbers) != list(range(len(losses))) and not stands_for_all:
            raise ValueError(
                f"step: the evaluation is made of {sum(n >= 0 for n in numbers)} of the {len(losses)} that evaluate() "
                "returned since the last step; merge all of them, call step() without arguments, or zero_grad() before "
                "those that count"
            )
        if merged_grads is None:
            same = _are_as_marked(self.parts[numbers[0]].gradients, optree.tree_leaves(evaluation.grads))
        else:
            same = evaluation.grads is merged_grads
        if same:
            if len(numbers) < len(losses):
                return self.whole()
            return evaluation._replace(grads=unshard(self.gradients("step")))
        if self._changed() or len(numbers) < len(losses):
            raise ValueError(
                "step: both .grad and the gradients of the evaluation have been changed since evaluate(); change "
                "one of them"
            )
        return evaluation

    def gradients(self, caller: str) -> dict[str, Tensor]:
        """Return each parameter's ``.grad``, or raise ``ValueError`` if one has none."""
        absent = [name for name, p in self.parameters.items() if p.grad is None]
        if absent:
            raise ValueError(
                f"{caller}: {absent} have no .grad any more; call zero_grad() before evaluate(), or not at all"
            )
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def _foreign(self) -> list[str]:
        """Return the names of parameters whose ``.grad`` is neither of ``evaluate`` nor zero."""
        return [name for name in self._changed() if _has_entries(self.parameters[name].grad)]

    def _drop_if_cleared(self) -> None:
        """Forget the parts where ``zero_grad`` was called since, in any of its ways."""
        grads = [p.grad for p in self.parameters.values()]
        if all(grad is None for grad in grads) or (self._changed() and not any(_has_entries(grad) for grad in grads)):
            self.parts.clear()

    def _mark(self) -> None:
        """Note how ``.grad`` and parameters are now."""
        self.versions = {name: version(p) for name, p in self.parameters.items()}
        self.marks = {name: _marks([p.grad]) for name, p in self.parameters.items() if p.grad is not None}

    def _changed(self) -> list[str]:
        """Return the names of parameters whose ``.grad`` is another tensor now, or was changed in place."""
        present = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        return [name for name, grad in present.items() if not _are_as_marked(self.marks.get(name, []), [grad])]


def _marks(tensors: Iterable[Tensor]) -> list[Mark]:
    return [(weak_reference(x), version(x)) for x in tensors]


def _are_as_marked(marks: list[Mark], tensors: list[Tensor]) -> bool:
    """Return whether tensors are the marked ones, unchanged."""
    pairs = zip(marks, tensors, strict=False)
    return len(marks) == len(tensors) and all(ref() is x and version(x) == before for (ref, before), x in pairs)


def _has_entries(grad: Tensor | None) -> bool:
    """Return whether a gradient has entries that are not zero."""
    if grad is None:
        return False
    values: Any = grad.coalesce().values() if grad.is_sparse else grad
    return bool(unshard(values.any()))  # of all processes
