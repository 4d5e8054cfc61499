"""Loss, gradients and statistics of a batch in one pass; products with its Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import optree
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp, vmap

from lrkfac.core.capture import OutputSpec, output_specs, run_captured, zero_probes
from lrkfac.core.covariances import Uses, from_matrices, gradient_matrix, prepared
from lrkfac.core.likelihoods import Likelihood
from lrkfac.core.tree import check_like, wide
from lrkfac.core.types import Evaluation, Layers, Statistics, Tree

ESTIMATORS = ("mc", "exact", "empirical")
COLUMNS = 16
"""Columns of the output Hessian's square root that the exact estimator takes back at once."""


def fisher(
    model: Callable[[Tree, Tree], Any],
    likelihood: Likelihood,
    layers: Layers,
    estimator: Literal["mc", "exact", "empirical"] = "mc",
    samples: int = 1,
    has_aux: bool = False,
) -> Callable[..., Evaluation]:
    """Makes the function that evaluates a batch: loss, gradients and what K-FAC needs.

    The output gradients ``g`` that enter ``B`` are, term by term,

    * ``"mc"``: those at targets drawn from the model, ``samples`` times: an unbiased estimate of the Fisher;
    * ``"exact"``: the columns of the square root of the output Hessian: the expectation itself;
    * ``"empirical"``: those at the true targets, at no extra cost, but not the Fisher (Kunstner, Balles &
      Hennig 2019, arXiv 1905.12558); where an example has several terms, they add up before they are squared.

    Args:
        model: Pure function ``model(params, inputs)``.
        likelihood: What its outputs mean.
        layers: From ``find_layers``.
        estimator: As above.
        samples: Draws per term for ``"mc"``.
        has_aux: Whether the model returns ``(outputs, aux)``.

    Returns:
        ``evaluate(params, inputs, targets, statistics=True, noise=None) -> Evaluation``. With
        ``statistics=False`` it costs a gradient and nothing more. ``noise`` is uniform on [0, 1), of shape
        ``[samples, *outputs.shape]``, for ``"mc"``; without it, it is drawn from torch's default generator
        (``torch.manual_seed``), and ``vmap`` then asks for ``randomness="different"``.

    Raises:
        ValueError: If an option is unknown or out of range; at evaluation, if parameters, targets or noise do
            not fit, or the batch is empty.
        TypeError: At evaluation, if the model returns no tensor, or targets have the wrong dtype.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {ESTIMATORS}, got {estimator!r}")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples: expected an integer >= 1, got {samples!r}")
    if not isinstance(likelihood, Likelihood):
        raise TypeError(f"likelihood: expected a Likelihood such as categorical(), got {likelihood!r}")
    covered = layers.covered
    specs: dict[Any, dict[str, list[OutputSpec]]] = {}

    def split(result: Any) -> tuple[Tensor, Any]:
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(f"model: expected (outputs, aux) with has_aux=True, got {type(result).__name__}")
        outputs, aux = result if has_aux else (result, None)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"model: expected outputs as a tensor, got {type(outputs).__name__}; "
                "pass has_aux=True if, and only if, the model returns (outputs, aux)"
            )
        if outputs.ndim == 0 or not outputs.is_floating_point():
            raise ValueError(
                "model: expected floating-point outputs with a batch axis, got "
                f"{outputs.dtype} of shape {tuple(outputs.shape)}"
            )
        if outputs.numel() == 0:
            raise ValueError(f"inputs: the batch is empty: outputs have the shape {tuple(outputs.shape)}")
        return outputs, aux

    def total_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        check_targets(likelihood, outputs, targets)
        terms = likelihood.negative_log_likelihood(outputs, targets)
        if terms.numel() != likelihood.terms(outputs):
            raise ValueError(
                f"likelihood {likelihood.name!r}: expected one negative log-likelihood for each of "
                f"{likelihood.terms(outputs)} terms, got the shape {tuple(terms.shape)}; see event_axes"
            )
        return terms.mean()

    def specs_for(params: Tree, inputs: Tree) -> dict[str, list[OutputSpec]]:
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
        params: Tree, inputs: Tree, targets: Tensor, statistics: bool = True, noise: Tensor | None = None
    ) -> Evaluation:
        check_like(layers.tree, params, "params")
        if not (torch.compiler.is_compiling() or statistics or specs):
            specs_for(params, inputs)  # refuses hidden effects, at the first batch
        rest: list[Any] = []

        def loss_of(params: Tree) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
            outputs, aux = split(model(params, inputs))
            return total_loss(outputs, targets), (outputs, without_others(aux, rest))

        if statistics:
            loss, grads, outputs, aux, found = with_statistics(params, inputs, targets, noise)
        else:
            grads, (loss, (outputs, tensors)) = grad_and_value(loss_of, has_aux=True)(params)
            aux, found = with_others(tensors, rest), None

        def outputs_of(params: Tree) -> Tensor:
            return split(model(params, inputs))[0]

        def product(tangent: Tree) -> Tree:
            check_like(layers.tree, tangent, "product: tangent")
            outputs, changed = jvp(outputs_of, (params,), (tangent,))
            _, transpose = vjp(outputs_of, params)
            return transpose(likelihood.hessian_product(outputs, changed) / likelihood.terms(outputs))[0]

        def gram(tangents: Tree) -> Tensor:
            def change(tangent: Tree) -> tuple[Tensor, Tensor]:
                return jvp(outputs_of, (params,), (tangent,))

            outputs, changed = vmap(change, out_dims=(None, 0))(tangents)
            curved = vmap(lambda c: likelihood.hessian_product(outputs, c))(changed)
            return (wide(changed).flatten(1) @ wide(curved).flatten(1).mT) / likelihood.terms(outputs)

        def quadratic(u: Tree, v: Tree) -> Tensor:
            check_like(layers.tree, u, "quadratic: u")
            check_like(layers.tree, v, "quadratic: v")
            both = (u,) if v is u else (u, v)
            return gram(optree.tree_map(lambda *leaves: torch.stack(leaves), *both))[0, -1]

        def loss_at(params: Tree) -> Tensor:
            check_like(layers.tree, params, "loss_at: params")
            return loss_of(params)[0]

        return Evaluation(loss, grads, outputs, aux, found, product, quadratic, gram, loss_at)

    def with_statistics(
        params: Tree, inputs: Tree, targets: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tree, Tensor, Any, Statistics]:
        leaves, structure = optree.tree_flatten(params)
        free = {i: leaf for i, leaf in enumerate(leaves) if i not in covered}
        rest: list[Any] = []

        def run(
            free: dict[int, Tensor], probes: dict[str, list[Tensor]]
        ) -> tuple[Tensor, tuple[list[Tensor], dict[str, tuple[Tensor, ...]]]]:
            merged = [free.get(i, leaf) for i, leaf in enumerate(leaves)]
            result, records = run_captured(model, layers, optree.tree_unflatten(structure, merged), inputs, probes)
            outputs, aux = split(result)
            inputs_of = {k: tuple([use.input for use in uses]) for k, uses in records.items()}
            return outputs, (without_others(aux, rest), inputs_of)

        probes = zero_probes(specs_for(params, inputs))
        outputs, transpose, (tensors, recorded) = vjp(run, free, probes, has_aux=True)
        cotangent, loss = grad_and_value(total_loss)(outputs, targets)
        free_grads, at_outputs = transpose(cotangent)
        # Weights take no part in the backward pass: their gradients follow from its rows, once.

        def standard_form(at_probes: Mapping[str, Sequence[Tensor]]) -> dict[str, tuple[Uses, Uses]]:
            form = {}
            for layer in layers:
                inputs_of = tuple([recorded[site][use] for site, use in layer.sites])
                gradients_of = tuple([at_probes[site][use] for site, use in layer.sites])
                form[layer.name] = prepared(layer, inputs_of, gradients_of, outputs.shape[0])
            return form

        standard = standard_form({site: [g[None] for g in uses] for site, uses in at_outputs.items()})
        matrices = [
            gradient_matrix(layer, standard[layer.name][0], tuple(g[0] for g in standard[layer.name][1]))
            for layer in layers
        ]
        found = {**free_grads, **from_matrices(list(layers), matrices)}
        grads = optree.tree_unflatten(structure, [found[i].to(leaf.dtype) for i, leaf in enumerate(leaves)])

        terms = likelihood.terms(outputs)
        if estimator == "empirical":
            gradients = {name: tuple(terms * g for g in uses) for name, (_, uses) in standard.items()}
        else:
            if estimator == "mc":
                cotangents = sampled_cotangents(likelihood, outputs, noise, samples)
            else:
                cotangents = exact_cotangents(likelihood, outputs)
            at_probes = take_back(lambda c: transpose(c)[1], cotangents, COLUMNS if estimator == "exact" else 1)
            gradients = {name: uses for name, (_, uses) in standard_form(at_probes).items()}
        weight_of_row = 1 / (terms * (samples if estimator == "mc" else 1))
        scale = torch.full((), weight_of_row, dtype=wide(outputs).dtype, device=outputs.device)
        inputs_of = {name: inputs for name, (inputs, _) in standard.items()}
        return loss, grads, outputs, with_others(tensors, rest), Statistics(inputs_of, gradients, scale)

    return evaluate


def check_targets(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> None:
    """Refuses targets that do not fit the outputs."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: expected a tensor, got {type(targets).__name__}")
    if likelihood.check is not None:
        likelihood.check(outputs, targets)


def sampled_cotangents(likelihood: Likelihood, outputs: Tensor, noise: Tensor | None, samples: int) -> Tensor:
    """Gradients of the terms at targets drawn from the model, ``[samples, *outputs.shape]``."""
    shape = (samples, *outputs.shape)
    if noise is None:
        noise = torch.rand(shape, dtype=wide(outputs).dtype, device=outputs.device)
    elif tuple(noise.shape) != shape:
        raise ValueError(f"noise: expected uniform numbers of shape {shape}, got {tuple(noise.shape)}")

    def total(outputs: Tensor, targets: Tensor) -> Tensor:
        return likelihood.negative_log_likelihood(outputs, targets).sum()

    return torch.stack([grad(total)(outputs, likelihood.sample(outputs, u)) for u in noise.unbind()])


def exact_cotangents(likelihood: Likelihood, outputs: Tensor) -> Tensor:
    """The columns of the square root of every example's Hessian, ``[columns, *outputs.shape]``.

    One column for each entry of all axes but the first: several terms of one example, such as the
    positions of a sequence, depend on the same weights, and one pass for all of them would mix them.
    """
    shape = outputs.shape[1:]
    columns = shape.numel()
    basis = torch.eye(columns, dtype=outputs.dtype, device=outputs.device).reshape(columns, 1, *shape)
    units = basis.expand(columns, *outputs.shape)
    return vmap(lambda unit: likelihood.square_root(outputs, unit))(units)


def take_back(
    transpose: Callable[[Tensor], dict[str, list[Tensor]]], cotangents: Tensor, at_once: int
) -> dict[str, tuple[Tensor, ...]]:
    """The cotangents at every probe, ``[k, ...]``, by ``at_once`` of them in one backward pass."""
    if at_once == 1:
        parts = [optree.tree_map(lambda g: g[None], transpose(c)) for c in cotangents.unbind()]
    else:
        parts = [vmap(transpose)(chunk) for chunk in cotangents.split(at_once)]
    joined = parts[0] if len(parts) == 1 else optree.tree_map(lambda *g: torch.cat(g), *parts)
    return {source: tuple(uses) for source, uses in joined.items()}


def without_others(aux: Any, rest: list[Any]) -> list[Tensor]:
    """The tensors of ``aux``, which is all that torch.func takes; ``rest`` becomes what is left of it."""
    leaves, structure = optree.tree_flatten(aux, none_is_leaf=True)
    others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
    rest[:] = [others, structure]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def with_others(tensors: list[Tensor], rest: list[Any]) -> Any:
    """The inverse of ``without_others``."""
    others, structure = rest
    remaining = iter(tensors)
    return optree.tree_unflatten(structure, [next(remaining) if other is None else other[0] for other in others])


def _tensors(tree: Tree) -> list[Tensor]:
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]
