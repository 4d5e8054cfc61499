"""The function that evaluates a batch, from one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_values
from lrkfac.core.base.autograd import recording
from lrkfac.core.base.containers import with_opened_inputs
from lrkfac.core.base.dtypes import in_dtype
from lrkfac.core.base.layout import with_layout_of
from lrkfac.core.base.leaves import tree_flatten, tree_unflatten
from lrkfac.core.base.profiling import profiled
from lrkfac.core.base.tree_checks import check_like
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.backward import leaf_gradients, loss_rows
from lrkfac.core.evaluation.capture import Captured, LayerRows, capture
from lrkfac.core.evaluation.estimators import Estimator, estimate
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.evaluation.gradients import thin_layers
from lrkfac.core.evaluation.objective import Objective
from lrkfac.core.evaluation.parts import Parts, Turn
from lrkfac.core.evaluation.products import FisherProducts
from lrkfac.core.evaluation.selection import check_selection, select_examples, select_layers
from lrkfac.core.evaluation.specs import SpecCache
from lrkfac.core.evaluation.tangents import ThinPass
from lrkfac.core.evaluation.ways import Ways
from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.statistics import Statistics
from lrkfac.core.likelihoods.joint import Joint


@dataclass(frozen=True)
class Evaluator:
    """The function that evaluates a batch; ``evaluator`` checks its arguments and makes it.

    Attributes:
        objective: The model and its likelihood.
        layers: The layers of the model.
        estimator: See ``evaluator``.
        samples: Draws per term for ``"mc"``.
        thin: Whether some gradients become lazy matrices.
        differentiable: Whether autograd follows evaluations.
        parts: The processes that share the work.
        cache: Output shapes for the latest input shapes; no part of the value, and empty in copies.
        ways: To products with the Fisher matrix, likewise.
    """

    objective: Objective
    layers: Layers = field(hash=False)
    estimator: Estimator
    samples: int
    thin: bool
    differentiable: bool
    parts: Parts | None = None
    cache: SpecCache = field(default_factory=SpecCache, compare=False, repr=False)
    ways: Ways = field(default_factory=Ways, compare=False, repr=False)

    def __call__(
        self,
        params: Tree,
        inputs: Tree,
        targets: Tree,
        statistics: bool = True,
        layers: tuple[str, ...] | None = None,
        examples: Tensor | None = None,
        noise: Tree | None = None,
    ) -> Evaluation:
        """Evaluate a batch.

        Args:
            params: A tree like the one that ``find_layers`` saw.
            inputs: Of the batch.
            targets: As the likelihood takes them.
            statistics: Whether to take statistics; ``False`` costs a gradient and nothing more, and the arguments
                below are not used.
            layers: Names of the layers of which to take statistics, all by default; see ``round_robin_refresh``. Those
                of other layers are empty and leave these as they are. An empty tuple takes none.
            examples: Numbers of the examples of which to take statistics, int64 ``[n]``, all by default;
                ``torch.randperm(size)[:n]`` chooses some at random. Takes a further pass, of these examples, along
                ``layers.batch_axes`` of the inputs and the leading axis of the targets. Loss and gradients are always
                those of the whole batch.
            noise: Uniform on [0, 1). For ``"mc"`` ``[samples, *outputs.shape]`` (a tree of such where outputs are one)
                for these examples; for ``"exact"`` with random signs ``[columns, N]``, with one column for each entry
                of the outputs of one of the ``N`` entries of their leading axis. With a ``group``, that of this
                process' part. By default it is a function of the number of the example and of one seed, which comes
                from torch's default generator (``torch.manual_seed``); ``vmap`` then asks for
                ``randomness="different"``. Processes with equal generators draw parts of one joint draw, without
                communication, in which example ``n`` of process ``rank`` has the number ``n * size + rank``, as
                ``torch.utils.data.DistributedSampler`` deals examples.

        Raises:
            ValueError: If parameters, targets, names, numbers or noise do not fit, an estimator that draws nothing
                gets noise, a tensor is on the device "meta", or the batch is empty. With a ``group`` on all processes:
                if one of them fails, nothing in the joint batch counts, only some take statistics, or, at the first
                evaluation, parameters differ.
            TypeError: If outputs or targets have another structure than the likelihood, or an argument the wrong type
                or dtype. Errors of the model pass.
        """
        model, opened = with_opened_inputs(self.objective.model, inputs)
        if model is not self.objective.model:
            same = replace(self, objective=replace(self.objective, model=model))  # with the same cache
            return same(params, opened, targets, statistics, layers, examples, noise)
        if self.parts is None:
            return self._evaluate(params, inputs, targets, statistics, layers, examples, noise)
        some = "" if examples is None or len(self.objective.heads.heads) == 1 else ", of some examples"
        facts = f"statistics={bool(statistics)}, layers={layers}{some}"
        counts = 1 + (statistics and layers != () and examples is not None)

        def run(turn: Turn) -> Evaluation:
            return self._evaluate(params, inputs, targets, statistics, layers, examples, noise, turn)

        return self.parts.evaluate(run, params, facts, counts)

    def _evaluate(
        self,
        params: Tree,
        inputs: Tree,
        targets: Tree,
        statistics: bool,
        layers: tuple[str, ...] | None,
        examples: Tensor | None,
        noise: Tree | None,
        turn: Turn | None = None,
    ) -> Evaluation:
        """Evaluate a batch, or the part of one that this process has; see ``__call__``."""
        check_like(self.layers.tree, params, "params")
        check_values(params=params, inputs=inputs, targets=targets)
        heads = self.objective.heads
        leaves = heads.leaves(targets, "targets")
        check_selection(statistics, layers, examples, self.layers)
        statistics = statistics and layers != ()
        of_all = statistics and examples is None
        with profiled("capture"), recording(self.differentiable):
            objective, loss, gradients, captured, rows, thin = self._loss_pass(params, inputs, leaves, of_all, turn)
            of_layers = self._estimate(objective.heads, captured, rows, leaves, noise) if of_all else None
            outputs, aux = captured.outputs, captured.aux
            weight = heads.total_weight(outputs, leaves)
            del captured, rows  # the graph of the whole batch makes room for that of some examples
            if statistics and examples is not None:
                of_layers = self._estimate_of_examples(params, inputs, leaves, examples, noise, turn)
        products = FisherProducts(objective, self.layers, params, inputs, leaves, self.differentiable, thin, self.ways)
        return Evaluation(
            loss=loss,
            grads=optree.tree_map(with_layout_of, gradients, params),
            outputs=heads.unflatten(outputs),
            aux=aux,
            statistics=None if of_layers is None else select_layers(of_layers, layers),
            # The compiler can return a partial function, but no bound method.
            product=partial(FisherProducts.product, products),
            quadratic=partial(FisherProducts.quadratic, products),
            gram=partial(FisherProducts.gram, products),
            loss_at=partial(FisherProducts.loss_at, products),
            weight=weight,
            thin=self.thin,
            size=_size(outputs[0], examples),
        )

    def _loss_pass(
        self, params: Tree, inputs: Tree, targets: list[Tensor], statistics: bool, turn: Turn | None
    ) -> tuple[Objective, Tensor, Tree, Captured, LayerRows, ThinPass | None]:
        """Return the objective, the loss, its gradient, the forward pass, the rows of its layers for statistics, and
        what is known of thin layers.

        A pass for statistics captures all layers, any other one those whose gradients become lazy; all leaves of the
        other layers are free.
        """
        first = not torch.compiler.is_compiling() and not len(self.cache)  # hidden effects show at the first batch
        known = statistics or self.thin or first
        specs = self.cache.specs(self.objective, self.layers, params, inputs) if known else {}
        thin = thin_layers(self.layers, specs) if self.thin else ()
        layers = self.layers if statistics else replace(self.layers, layers=thin)
        kept = {source for layer in thin for source, _ in layer.sites}
        captured = capture(self.objective, layers, params, inputs, specs, kept=kept)
        objective = self._counted(captured, targets, turn)
        empirical = statistics and self.estimator == "empirical"
        backward = loss_rows(objective, captured, targets, empirical)
        by_index = leaf_gradients(captured, backward, [layer.name for layer in thin])
        leaves, structure = tree_flatten(params)
        gradients = tree_unflatten(structure, [in_dtype(by_index[i], leaf.dtype) for i, leaf in enumerate(leaves)])
        rows = backward.rows
        if not empirical:  # the rows of the loss make room for those of the estimator
            rows = {name: (uses, ()) for name, (uses, _) in rows.items()}
        return objective, backward.loss, gradients, captured, rows, ThinPass.of(self.layers, thin, captured, params)

    def _counted(self, captured: Captured, targets: list[Tensor], turn: Turn | None) -> Objective:
        """Return the objective, with the totals of a joint batch where this is a part of one."""
        if turn is None:
            return self.objective
        return replace(self.objective, heads=turn.counted(self.objective.heads, captured.outputs, targets))

    def _estimate(
        self, heads: Joint, captured: Captured, rows: LayerRows, targets: list[Tensor], noise: Tree | None
    ) -> Statistics:
        processes = None if self.parts is None else self.parts.processes
        return estimate(captured, rows, heads, targets, self.estimator, self.samples, noise, processes)

    def _estimate_of_examples(
        self,
        params: Tree,
        inputs: Tree,
        targets: list[Tensor],
        examples: Tensor,
        noise: Tree | None,
        turn: Turn | None,
    ) -> Statistics:
        """Return the statistics of some examples, by a pass in which no leaf is free."""
        inputs, targets = select_examples(self.layers, inputs, targets, examples)
        specs = self.cache.specs(self.objective, self.layers, params, inputs)
        captured = capture(self.objective, self.layers, params, inputs, specs, free=False)
        if captured.outputs[0].shape[0] != examples.shape[0]:
            raise ValueError(
                f"examples: expected outputs of {examples.shape[0]} examples, got the shape "
                f"{tuple(captured.outputs[0].shape)}; inputs and targets must have the batch as their leading axis"
            )
        objective = self._counted(captured, targets, turn)
        if self.estimator == "empirical":
            rows = loss_rows(objective, captured, targets, summed=True).rows
        else:
            rows = captured.single_rows(captured.probes)  # for the inputs; the zero gradients only give shapes
        # The gradient is that of all examples.
        return self._estimate(objective.heads, captured, rows, targets, noise)._replace(residuals=())


def _size(outputs: Tensor, examples: Tensor | None) -> Tensor:
    """Return the number of entries of the outputs of all examples, wherever these stand, or of some."""
    number = outputs.numel() if examples is None else outputs.shape[1:].numel() * examples.shape[0]
    return torch.full((), number, dtype=torch.int64, device=outputs.device)
