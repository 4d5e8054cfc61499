"""Loss, gradients and statistics of a batch from one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_flag, check_model, check_values
from lrkfac.core.base.autograd import recording
from lrkfac.core.base.containers import with_opened_inputs
from lrkfac.core.base.layout import with_layout_of
from lrkfac.core.base.profiling import profiled
from lrkfac.core.base.tree_checks import check_like
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.backward import leaf_gradients, loss_rows
from lrkfac.core.evaluation.capture import Captured, LayerRows, capture
from lrkfac.core.evaluation.estimators import Estimator, check_estimator, estimate
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.evaluation.gradients import thin_layers
from lrkfac.core.evaluation.objective import Objective
from lrkfac.core.evaluation.products import FisherProducts
from lrkfac.core.evaluation.selection import check_selection, select_examples, select_layers
from lrkfac.core.evaluation.specs import SpecCache
from lrkfac.core.layers.description import Layers, check_layers
from lrkfac.core.layers.statistics import Statistics
from lrkfac.core.likelihoods.joint import Joint, joint
from lrkfac.core.likelihoods.protocol import Likelihood


def evaluator(
    model: Callable[[Tree, Tree], Any],
    likelihood: Likelihood | Joint,
    layers: Layers,
    estimator: Estimator = "mc",
    samples: int = 1,
    has_aux: bool = False,
    thin: bool = False,
    differentiable: bool = False,
) -> Evaluator:
    """Return the function that evaluates a batch: loss, gradients and statistics for K-FAC.

    The output gradients ``g`` that enter ``B`` are, term by term,

    * ``"mc"``: those at targets drawn from the model, ``samples`` times: an unbiased estimate of the Fisher;
    * ``"exact"``: the columns of the square root of the output Hessian: the expectation itself. Where outputs of one
      example depend on others, as with BatchNorm in training mode, or several terms of an example stand along the
      leading axis of the outputs (``print(layers)`` says so), each term gets a random sign: an unbiased estimate;
    * ``"empirical"``: those at the true targets, at no extra cost, but not the Fisher (Kunstner, Balles &
      Hennig 2019, arXiv 1905.12558); where an example has several terms, they add up before they are squared,
      weights of terms and heads included;
    * ``"forward_only"``: none, ``B = I``, at no extra cost either (Benzing 2022, arXiv 2201.12250); for Kronecker
      structures alone. Scales and shifts, which have no ``A``, then pass as plain gradients.

    Args:
        model: Pure function ``model(params, inputs)``.
        likelihood: The likelihood of its outputs; ``joint(...)`` where they are a tree. Of a dictionary, dataclass or
            similar container with the entry ``logits``, a single one takes that entry.
        layers: From ``find_layers``.
        estimator: As above.
        samples: Draws per term for ``"mc"``.
        has_aux: Whether the model returns ``(outputs, aux)``.
        thin: Whether the gradient of a linear layer's weight becomes a ``LazyMatrix`` where its rows hold at most half
            as many numbers, ``2 n (d_in + d_out) <= d_in d_out`` for ``n`` rows. Off by default because
            ``evaluation.grads`` reach the user, and torch's functions take no ``LazyMatrix``; ``LowRankKFAC``, which
            hands none out, has it on. ``lrkfac.materialize`` makes tensors of them, as does the end of a chain.
        differentiable: Whether autograd follows an evaluation, so that ``backward()`` goes through a step to parameters
            that require gradients. By default it does not: a loop over such parameters, as ``named_parameters()`` and
            ``torch.func.stack_module_state`` give them, keeps no graph of its past steps. The transformations of
            ``torch.func`` differentiate either way.

    Returns:
        ``evaluate(params, inputs, targets, statistics=True, layers=None, examples=None, noise=None)``, which returns
        an ``Evaluation``; see ``Evaluator.__call__``. It can be copied and pickled where ``model`` and ``likelihood``
        can.

    Raises:
        ValueError: If an option is unknown or out of range, or ``differentiable`` with ``layers.autograd``.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch, lrkfac
        >>> model, params = lrkfac.from_module(torch.nn.Linear(3, 2))
        >>> inputs, targets = torch.randn(8, 3), torch.randint(2, (8,))
        >>> layers = lrkfac.find_layers(model, params, inputs)
        >>> evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers)
        >>> evaluate(params, inputs, targets, statistics=False).grads["weight"].shape
        torch.Size([2, 3])

        Statistics of a random quarter of the examples:

        >>> evaluation = evaluate(params, inputs, targets, examples=torch.randperm(8)[:2])
        >>> [uses[0].shape for uses in evaluation.statistics.inputs.values()]
        [torch.Size([2, 3])]
    """
    check_model(model)
    check_layers(layers)
    check_flag(has_aux, "has_aux")
    check_flag(thin, "thin")
    check_flag(differentiable, "differentiable")
    if differentiable and layers.autograd:
        raise ValueError(
            "differentiable: expected False for a model whose derivatives are taken by torch.autograd, since it does "
            "what torch.func refuses (it calls torch.autograd.grad, or a torch.autograd.Function without "
            "setup_context); use torch.func.grad and setup_context in the model"
        )
    check_estimator(estimator, samples)
    if not isinstance(likelihood, Likelihood | Joint):
        raise TypeError(f"likelihood: expected a Likelihood such as categorical(), or joint(...), got {likelihood!r}")
    heads = likelihood if isinstance(likelihood, Joint) else joint(likelihood)
    return Evaluator(Objective(model, heads, has_aux), layers, estimator, samples, thin, differentiable)


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
        cache: Output shapes for the latest input shapes; no part of the value, and empty in copies.
    """

    objective: Objective
    layers: Layers = field(hash=False)
    estimator: Estimator
    samples: int
    thin: bool
    differentiable: bool
    cache: SpecCache = field(default_factory=SpecCache, compare=False, repr=False)

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
                of the outputs of one of the ``N`` entries of their leading axis. By default it comes from torch's
                default generator (``torch.manual_seed``), and ``vmap`` then asks for ``randomness="different"``.

        Raises:
            ValueError: If parameters, targets, names, numbers or noise do not fit, an estimator that draws nothing
                gets noise, a tensor is on the device "meta", or the batch is empty.
            TypeError: If outputs or targets have another structure than the likelihood, or an argument the wrong type
                or dtype. Errors of the model pass.
        """
        model, opened = with_opened_inputs(self.objective.model, inputs)
        if model is not self.objective.model:
            same = replace(self, objective=replace(self.objective, model=model))  # with the same cache
            return same(params, opened, targets, statistics, layers, examples, noise)
        check_like(self.layers.tree, params, "params")
        check_values(params=params, inputs=inputs)
        heads = self.objective.heads
        leaves = heads.leaves(targets, "targets")
        check_selection(statistics, layers, examples, self.layers)
        statistics = statistics and layers != ()
        of_all = statistics and examples is None
        with profiled("capture"), recording(self.differentiable):
            loss, gradients, captured, rows = self._loss_pass(params, inputs, leaves, of_all)
            of_layers = self._estimate(captured, rows, leaves, noise) if of_all else None
            outputs, aux = captured.outputs, captured.aux
            weight = heads.total_weight(outputs, leaves)
            del captured, rows  # the graph of the whole batch makes room for that of some examples
            if statistics and examples is not None:
                of_layers = self._estimate_of_examples(params, inputs, leaves, examples, noise)
        products = FisherProducts(self.objective, self.layers, params, inputs, leaves, self.differentiable)
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
        )

    def _loss_pass(
        self, params: Tree, inputs: Tree, targets: list[Tensor], statistics: bool
    ) -> tuple[Tensor, Tree, Captured, LayerRows]:
        """Return the loss, its gradient, the forward pass, and the rows of its layers if statistics need them.

        A pass for statistics captures all layers, any other one those whose gradients become lazy; all leaves of the
        other layers are free.
        """
        first = not torch.compiler.is_compiling() and not len(self.cache)  # hidden effects show at the first batch
        known = statistics or self.thin or first
        specs = self.cache.specs(self.objective, self.layers, params, inputs) if known else {}
        thin = thin_layers(self.layers, specs) if self.thin else ()
        layers = self.layers if statistics else replace(self.layers, layers=thin)
        captured = capture(self.objective, layers, params, inputs, specs)
        empirical = statistics and self.estimator == "empirical"
        backward = loss_rows(self.objective, captured, targets, empirical)
        by_index = leaf_gradients(captured, backward, [layer.name for layer in thin])
        leaves, structure = optree.tree_flatten(params)
        gradients = optree.tree_unflatten(structure, [by_index[i].to(leaf.dtype) for i, leaf in enumerate(leaves)])
        rows = backward.rows
        if not empirical:  # the rows of the loss make room for those of the estimator
            rows = {name: (uses, ()) for name, (uses, _) in rows.items()}
        return backward.loss, gradients, captured, rows

    def _estimate(self, captured: Captured, rows: LayerRows, targets: list[Tensor], noise: Tree | None) -> Statistics:
        return estimate(captured, rows, self.objective.heads, targets, self.estimator, self.samples, noise)

    def _estimate_of_examples(
        self, params: Tree, inputs: Tree, targets: list[Tensor], examples: Tensor, noise: Tree | None
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
        if self.estimator == "empirical":
            rows = loss_rows(self.objective, captured, targets, summed=True).rows
        else:
            rows = captured.single_rows(captured.probes)  # for the inputs; the zero gradients only give shapes
        return self._estimate(captured, rows, targets, noise)
