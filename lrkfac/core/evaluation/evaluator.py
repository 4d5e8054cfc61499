"""Loss, gradients and statistics of a batch in one pass; products with its Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp, vmap

from lrkfac.core.base.arguments import check_flag, check_model, check_values
from lrkfac.core.base.dtypes import wide
from lrkfac.core.base.layout import with_layout_of
from lrkfac.core.base.profiling import profiled
from lrkfac.core.base.tree_checks import check_like, check_stacked
from lrkfac.core.base.trees import materialize, scaled
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.auxiliary import with_others, without_others
from lrkfac.core.evaluation.capture import Captured, Form, standard_form
from lrkfac.core.evaluation.cotangents import divided
from lrkfac.core.evaluation.derivatives import gradient, transposed
from lrkfac.core.evaluation.estimators import Estimator, check_options, statistics_of
from lrkfac.core.evaluation.evaluation import Evaluation
from lrkfac.core.evaluation.gradients import by_rows, gradients_of, thin_layers
from lrkfac.core.evaluation.selection import Asked, chosen, examples_of, of_layers
from lrkfac.core.layers.description import Layer, Layers, check_layers
from lrkfac.core.layers.matrix import collect
from lrkfac.core.layers.padding import with_constant_padding
from lrkfac.core.layers.probes import OutputSpec, output_specs, zero_probes
from lrkfac.core.layers.statistics import Statistics
from lrkfac.core.layers.tracing import run_captured
from lrkfac.core.likelihoods.joint import Joint, joint
from lrkfac.core.likelihoods.protocol import Likelihood

Specs = dict[str, list[OutputSpec]]
"""What the probes of each source must look like."""


Free = tuple[dict[int, Tensor], dict[str, list[Tensor]]]
"""Leaves of the parameters, by number, and the probes of each source."""


def evaluator(
    model: Callable[[Tree, Tree], Any],
    likelihood: Likelihood | Joint,
    layers: Layers,
    estimator: Estimator = "mc",
    samples: int = 1,
    has_aux: bool = False,
    examples: int | None = None,
    thin: bool = False,
) -> Callable[..., Evaluation]:
    """Makes the function that evaluates a batch: loss, gradients and what K-FAC needs.

    The output gradients ``g`` that enter ``B`` are, term by term,

    * ``"mc"``: those at targets drawn from the model, ``samples`` times: an unbiased estimate of the Fisher;
    * ``"exact"``: the columns of the square root of the output Hessian: the expectation itself;
    * ``"empirical"``: those at the true targets, at no extra cost, but not the Fisher (Kunstner, Balles &
      Hennig 2019, arXiv 1905.12558); where an example has several terms, they add up before they are squared,
      weights of terms and heads included;
    * ``"forward_only"``: none, ``B = I``, at no extra cost either (Benzing 2022, arXiv 2201.12250); for Kronecker
      structures alone. Scales and shifts, which have no ``A``, then pass as plain gradients.

    Args:
        model: Pure function ``model(params, inputs)``.
        likelihood: What its outputs mean; ``joint(...)`` where they are a tree.
        layers: From ``find_layers``.
        estimator: As above.
        samples: Draws per term for ``"mc"``.
        has_aux: Whether the model returns ``(outputs, aux)``.
        examples: Statistics are taken from so many examples of the batch (or all, where it has fewer), drawn
            without replacement from torch's default generator, by a pass of their own; loss and gradients of all.
        thin: Whether the gradient of a linear layer's weight is held by its rows, as a ``LazyMatrix``, where these
            hold at most half as many numbers, ``2 n (d_in + d_out) <= d_in d_out`` for ``n`` of them. They, and what
            K-FAC makes of other matrices, are formed at a chain's end, or by ``lrkfac.materialize``: off for that.

    Returns:
        ``evaluate(params, inputs, targets, statistics=True, noise=None) -> Evaluation``. With
        ``statistics=False`` it costs a gradient and nothing more; where ``statistics`` are names of layers (a tuple;
        see ``round_robin_refresh``), those of the other layers are empty and leave these as they are; where they are
        numbers of examples, int64 ``[n]``, they are those of these examples alone (of every tensor of ``inputs`` whose
        leading axis is as long as that of ``targets``). ``noise`` is uniform on [0, 1), of shape
        ``[samples, *outputs.shape]`` (a tree of such where outputs are one) for these examples, for ``"mc"`` alone,
        and not used where no statistics are taken; without it, it is drawn from torch's default generator
        (``torch.manual_seed``), and ``vmap`` then asks for ``randomness="different"``.

    Raises:
        ValueError: If an option is unknown or out of range; at evaluation, if parameters, targets or noise do
            not fit, noise is given to an estimator that draws nothing, a tensor is on the device "meta", or the batch
            is empty.
        TypeError: If an argument has the wrong type; at evaluation, if outputs or targets have another structure than
            the likelihood, or targets the wrong dtype. What the model raises passes.
    """
    check_model(model)
    check_layers(layers)
    check_flag(has_aux, "has_aux")
    check_flag(thin, "thin")
    check_options(estimator, samples, examples)
    if not isinstance(likelihood, Likelihood | Joint):
        raise TypeError(f"likelihood: expected a Likelihood such as categorical(), or joint(...), got {likelihood!r}")
    heads = likelihood if isinstance(likelihood, Joint) else joint(likelihood)
    every = frozenset([layer.name for layer in layers])
    specs: dict[Any, Specs] = {}

    def specs_for(params: Tree, inputs: Tree) -> Specs:
        if torch.compiler.is_compiling():
            return output_specs(model, layers, params, inputs)
        tensors = _tensors((params, inputs))
        signature = tuple([(tuple(x.shape), x.dtype, x.device) for x in tensors])
        autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted({x.device.type for x in tensors})
        ]
        key = (signature, optree.tree_structure(inputs), tuple(autocast))
        if key not in specs:
            specs[key] = output_specs(model, layers, params, inputs)
        return specs[key]

    def evaluate(
        params: Tree, inputs: Tree, targets: Tree, statistics: Asked = True, noise: Tree | None = None
    ) -> Evaluation:
        check_like(layers.tree, params, "params")
        check_values(params=params, inputs=inputs)
        start = params
        targets = heads.leaves(targets, "targets")
        statistics, names = chosen(statistics, every)
        whole = statistics is True and examples is None
        first = not (torch.compiler.is_compiling() or specs)  # refuses hidden effects, at the first batch
        known = specs_for(params, inputs) if whole or thin or (first and statistics is False) else {}
        rest: list[Any] = []

        def loss_of(params: Tree) -> tuple[Tensor, Any]:
            outputs, aux = heads.split(model(params, inputs), has_aux)
            return heads.loss(outputs, targets), (outputs, without_others(aux, rest))

        rows = thin_layers(layers, known) if thin else ()
        if whole:
            with profiled("capture"):
                loss, grads, aux, seen, of_loss = by_capture(params, inputs, targets, known, layers, rows)
                found = statistics_of(seen, of_loss, heads, targets, estimator, samples, noise)
            outputs = seen.outputs
        elif rows and statistics is False:
            with profiled("capture"):
                loss, grads, aux, outputs = held_by_rows(params, inputs, targets, known, rows)
            found = None
        else:
            grads, loss, (outputs, tensors) = gradient(loss_of, params)
            aux, found = with_others(tensors, rest), None
            if statistics is not False:
                if statistics is True:
                    statistics = torch.randperm(outputs[0].shape[0], device=outputs[0].device)[:examples]
                with profiled("capture"):
                    found = of_examples(params, inputs, targets, statistics, noise)

        grads = optree.tree_map(with_layout_of, grads, params)

        def outputs_of(params: Tree) -> list[Tensor]:
            with with_constant_padding(layers):
                return heads.split(model(params, inputs), has_aux)[0]

        def change(tangent: Tree) -> tuple[list[Tensor], list[Tensor]]:
            try:
                return jvp(outputs_of, (params,), (tangent,))
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"model: an operation has no forward derivative, which products with the Fisher need: {error}; "
                    "attention has one under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), its modules in eval mode "
                    "after torch.backends.mha.set_fastpath_enabled(False)"
                ) from error

        def product(tangent: Tree) -> Tree:
            check_like(params, tangent, "product: tangent")
            tangent = materialize(tangent)
            outputs, changed = change(tangent)
            _, transpose = vjp(outputs_of, params)
            return transpose(heads.product(outputs, targets, changed))[0]

        def gram(tangents: Tree) -> Tensor:
            def both(tangent: Tree) -> tuple[list[Tensor], list[Tensor]]:
                outputs, changed = change(tangent)
                return changed, heads.product(outputs, targets, changed)

            check_stacked(params, tangents, "gram: tangents")
            changed, curved = vmap(both)(tangents)
            of_heads = [wide(c).flatten(1) @ wide(h).flatten(1).mT for c, h in zip(changed, curved, strict=True)]
            return torch.stack(of_heads).sum(dim=0)

        def quadratic(u: Tree, v: Tree) -> Tensor:
            check_like(params, u, "quadratic: u")
            check_like(params, v, "quadratic: v")
            both = (materialize(u),) if v is u else (materialize(u), materialize(v))
            return gram(optree.tree_map(lambda *leaves: torch.stack(leaves), *both))[0, -1]

        def loss_at(params: Tree) -> Tensor:
            check_like(start, params, "loss_at: params")
            return loss_of(params)[0]

        weight, found = heads.total_weight(outputs, targets), found and of_layers(found, names)
        first_four = loss, grads, heads.unflatten(outputs), aux
        return Evaluation(*first_four, found, product, quadratic, gram, loss_at, weight, thin)

    def runner(params: Tree, inputs: Tree, layers: Layers, rest: list[Any]) -> Callable[[Free], tuple[Any, Any]]:
        """The model as a function of some leaves, by number, and of the probes of some layers."""
        leaves, structure = optree.tree_flatten(params)

        def run(both: Free) -> tuple[list[Tensor], tuple[list[Tensor], dict[str, list[Tensor]]]]:
            free, probes = both
            merged = [free.get(i, leaf) for i, leaf in enumerate(leaves)]
            result, records = run_captured(model, layers, optree.tree_unflatten(structure, merged), inputs, probes)
            outputs, aux = heads.split(result, has_aux)
            inputs_of = {source: [use.input for use in uses] for source, uses in records.items()}
            return outputs, (without_others(aux, rest), inputs_of)

        return run

    def captured(
        params: Tree, inputs: Tree, known: Specs, layers: Layers, free: dict[int, Tensor], rest: list[Any]
    ) -> tuple[Captured, list[Tensor]]:
        probes, run = zero_probes(known, layers.sources), runner(params, inputs, layers, rest)
        outputs, transpose, (tensors, recorded) = transposed(run, (free, probes))
        return Captured(layers, outputs, recorded, probes, transpose), tensors

    def held_by_rows(
        params: Tree, inputs: Tree, targets: list[Tensor], known: Specs, rows: tuple[Layer, ...]
    ) -> tuple[Tensor, Tree, Any, list[Tensor]]:
        """Loss, gradients (of ``rows`` held so), aux and outputs, by one derivative."""
        leaves, structure = optree.tree_flatten(params)
        own = replace(layers, layers=rows)
        rest: list[Any] = []
        run = runner(params, inputs, own, rest)

        def loss_of(both: Free) -> tuple[Tensor, Any]:
            outputs, others = run(both)
            return heads.loss(outputs, targets), (outputs, *others)

        free = {i: x for i, x in enumerate(leaves) if i not in own.covered}
        (found, at_probes), loss, (outputs, *others) = gradient(loss_of, (free, zero_probes(known, own.sources)))
        form = standard_form(own, others[1], {k: [g[None] for g in uses] for k, uses in at_probes.items()}, outputs)
        for layer in rows:
            found |= by_rows(layer, *form[layer.name])
        grads = optree.tree_unflatten(structure, [found[i].to(leaf.dtype) for i, leaf in enumerate(leaves)])
        return loss, grads, with_others(others[0], rest), outputs

    def by_capture(
        params: Tree, inputs: Tree, targets: list[Tensor], known: Specs, layers: Layers, rows: tuple[Layer, ...]
    ) -> tuple[Tensor, Tree, Any, Captured, Form]:
        """Loss, gradients (of ``rows`` held so), aux; what was captured of ``layers``."""
        leaves, structure = optree.tree_flatten(params)
        rest: list[Any] = []
        free = {i: x for i, x in enumerate(leaves) if i not in layers.covered}
        seen, tensors = captured(params, inputs, known, layers, free, rest)
        cotangent, loss = grad_and_value(lambda f: heads.loss(f, targets))(seen.outputs)
        scale = heads.normalization(seen.outputs, targets)[0] if estimator == "empirical" else None
        free_grads, at_probes = seen.transpose(divided(cotangent, scale))
        # Weights take no part in the backward pass: their gradients follow from its rows, once.
        of_loss = seen.standard_form_of_one(at_probes)
        times = partial(scaled, scale) if scale is not None else lambda tree: tree
        found: dict[int, Any] = dict(times(free_grads))
        for layer in layers:
            inputs_of, gradients = of_loss[layer.name]
            if layer in rows:
                found |= times(by_rows(layer, inputs_of, gradients))
            else:
                collect(found, gradients_of(layer, inputs_of, tuple(g[0] for g in gradients), scale))
        del at_probes
        if estimator != "empirical":  # the rows of the loss make room for those of the estimator
            of_loss = {name: (inputs_of, ()) for name, (inputs_of, _) in of_loss.items()}
        cast = [found[i].to(leaf.dtype) for i, leaf in enumerate(leaves)]
        return loss, optree.tree_unflatten(structure, cast), with_others(tensors, rest), seen, of_loss

    def of_examples(
        params: Tree, inputs: Tree, targets: list[Tensor], numbers: Tensor, noise: Tree | None
    ) -> Statistics:
        size = targets[0].shape[0]
        inputs, targets = examples_of(inputs, numbers, size), examples_of(targets, numbers, size)
        seen, _ = captured(params, inputs, specs_for(params, inputs), layers, {}, [])
        if seen.outputs[0].shape[0] != numbers.shape[0]:
            raise ValueError(
                f"statistics: expected outputs of {numbers.shape[0]} examples, got the shape "
                f"{tuple(seen.outputs[0].shape)}; inputs and targets must have the batch as their leading axis"
            )
        at_probes = seen.probes  # of which nothing but the shape matters
        if estimator == "empirical":
            scale, _ = heads.normalization(seen.outputs, targets)
            _, at_probes = seen.transpose(divided(grad(lambda f: heads.loss(f, targets))(seen.outputs), scale))
        return statistics_of(seen, seen.standard_form_of_one(at_probes), heads, targets, estimator, samples, noise)

    return evaluate


def _tensors(tree: Tree) -> list[Tensor]:
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]
