"""Loss, gradients and statistics of a batch in one pass; products with its Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import optree
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp, vmap

from lrkfac.core.capture import OutputSpec, output_specs, run_captured, zero_probes
from lrkfac.core.covariances import from_matrices, gradient_matrix
from lrkfac.core.likelihoods import Likelihood
from lrkfac.core.statistics import Captured, Estimator, examples_of, statistics_of, with_others, without_others
from lrkfac.core.tree import check_like, wide
from lrkfac.core.types import Evaluation, Layers, Statistics, Tree

ESTIMATORS = get_args(Estimator)


def fisher(
    model: Callable[[Tree, Tree], Any],
    likelihood: Likelihood,
    layers: Layers,
    estimator: Estimator = "mc",
    samples: int = 1,
    has_aux: bool = False,
    examples: int | None = None,
) -> Callable[..., Evaluation]:
    """Makes the function that evaluates a batch: loss, gradients and what K-FAC needs.

    The output gradients ``g`` that enter ``B`` are, term by term,

    * ``"mc"``: those at targets drawn from the model, ``samples`` times: an unbiased estimate of the Fisher;
    * ``"exact"``: the columns of the square root of the output Hessian: the expectation itself;
    * ``"empirical"``: those at the true targets, at no extra cost, but not the Fisher (Kunstner, Balles &
      Hennig 2019, arXiv 1905.12558); where an example has several terms, they add up before they are squared;
    * ``"forward_only"``: none, ``B = I``, at no extra cost either (Benzing 2022, arXiv 2201.12250); for Kronecker
      structures alone. Scales and shifts, which have no ``A``, then pass as plain gradients.

    Args:
        model: Pure function ``model(params, inputs)``.
        likelihood: What its outputs mean.
        layers: From ``find_layers``.
        estimator: As above.
        samples: Draws per term for ``"mc"``.
        has_aux: Whether the model returns ``(outputs, aux)``.
        examples: Statistics are taken from so many examples of the batch (or all, where it has fewer), drawn
            without replacement from torch's default generator, by a pass of their own; loss and gradients of all.

    Returns:
        ``evaluate(params, inputs, targets, statistics=True, noise=None) -> Evaluation``. With
        ``statistics=False`` it costs a gradient and nothing more; where ``statistics`` are numbers of examples,
        int64 ``[n]``, they are those of these examples alone (of every tensor of ``inputs`` whose leading axis
        is as long as that of ``targets``). ``noise`` is uniform on [0, 1), of shape ``[samples, *outputs.shape]`` for
        these examples, for ``"mc"``; without it, it is drawn from torch's default generator
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
    if examples is not None and (isinstance(examples, bool) or not isinstance(examples, int) or examples < 1):
        raise ValueError(f"examples: expected None or an integer >= 1, got {examples!r}")
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
        params: Tree, inputs: Tree, targets: Tensor, statistics: bool | Tensor = True, noise: Tensor | None = None
    ) -> Evaluation:
        check_like(layers.tree, params, "params")
        if isinstance(statistics, Tensor):
            check_numbers(statistics)
        elif not isinstance(statistics, bool):
            raise TypeError(f"statistics: expected True, False or a tensor of numbers of examples, got {statistics!r}")
        if statistics is False and not (torch.compiler.is_compiling() or specs):
            specs_for(params, inputs)  # refuses hidden effects, at the first batch
        rest: list[Any] = []

        def loss_of(params: Tree) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
            outputs, aux = split(model(params, inputs))
            return total_loss(outputs, targets), (outputs, without_others(aux, rest))

        if statistics is True and examples is None:
            loss, grads, outputs, aux, found = with_statistics(params, inputs, targets, noise)
        else:
            grads, (loss, (outputs, tensors)) = grad_and_value(loss_of, has_aux=True)(params)
            aux, found = with_others(tensors, rest), None
            if statistics is not False:
                if statistics is True:
                    statistics = torch.randperm(outputs.shape[0], device=outputs.device)[:examples]
                found = of_examples(params, inputs, targets, statistics, noise)

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

    def captured(params: Tree, inputs: Tree, free: dict[int, Tensor], rest: list[Any]) -> tuple[Captured, list[Tensor]]:
        leaves, structure = optree.tree_flatten(params)

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
        return Captured(layers, outputs, recorded, probes, transpose), tensors

    def with_statistics(
        params: Tree, inputs: Tree, targets: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tree, Tensor, Any, Statistics]:
        leaves, structure = optree.tree_flatten(params)
        rest: list[Any] = []
        seen, tensors = captured(params, inputs, {i: x for i, x in enumerate(leaves) if i not in covered}, rest)
        cotangent, loss = grad_and_value(total_loss)(seen.outputs, targets)
        free_grads, at_probes = seen.transpose(cotangent)
        # Weights take no part in the backward pass: their gradients follow from its rows, once.
        of_loss = seen.standard_form_of_one(at_probes)
        matrices = [
            gradient_matrix(layer, of_loss[layer.name][0], tuple(g[0] for g in of_loss[layer.name][1]))
            for layer in layers
        ]
        found = {**free_grads, **from_matrices(list(layers), matrices)}
        grads = optree.tree_unflatten(structure, [found[i].to(leaf.dtype) for i, leaf in enumerate(leaves)])
        statistics = statistics_of(seen, of_loss, likelihood, estimator, samples, noise)
        return loss, grads, seen.outputs, with_others(tensors, rest), statistics

    def of_examples(params: Tree, inputs: Tree, targets: Tensor, numbers: Tensor, noise: Tensor | None) -> Statistics:
        size = targets.shape[0]
        inputs, targets = examples_of(inputs, numbers, size), examples_of(targets, numbers, size)
        seen, _ = captured(params, inputs, {}, [])
        if seen.outputs.shape[0] != numbers.shape[0]:
            raise ValueError(
                f"statistics: expected outputs of {numbers.shape[0]} examples, got the shape "
                f"{tuple(seen.outputs.shape)}; inputs and targets must have the batch as their leading axis"
            )
        at_probes = seen.probes  # of which nothing but the shape matters
        if estimator == "empirical":
            _, at_probes = seen.transpose(grad(total_loss)(seen.outputs, targets))
        return statistics_of(seen, seen.standard_form_of_one(at_probes), likelihood, estimator, samples, noise)

    return evaluate


def check_targets(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> None:
    """Refuses targets that do not fit the outputs."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: expected a tensor, got {type(targets).__name__}")
    if likelihood.check is not None:
        likelihood.check(outputs, targets)


def check_numbers(numbers: Tensor) -> None:
    """Refuses what does not choose examples by number."""
    if numbers.ndim != 1 or numbers.dtype not in (torch.int64, torch.int32) or not numbers.numel():
        raise ValueError(
            "statistics: expected True, False or the numbers of some examples, int64 of shape [n], got "
            f"{numbers.dtype} of shape {tuple(numbers.shape)}"
        )


def _tensors(tree: Tree) -> list[Tensor]:
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]
