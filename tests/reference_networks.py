"""Float64 dense references for whole networks of ``tests/cases.py``: loss, gradients, factors, the explicit
Gauss-Newton matrix and a K-FAC step. Conventions as in ``tests/reference.py``; never imports lrkfac.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tests.cases import Case, Params, apply_stage
from tests.reference import (
    kronecker_preconditioned,
    layer_input_rows,
    layer_output_rows,
    negative_log_likelihood,
    output_hessian,
    output_hessian_root,
    second_moment,
    terms,
)


class Factors(NamedTuple):
    """The Kronecker factors of one layer: A [groups, d_in (+ 1), d_in (+ 1)] and B [groups, d_out, d_out]."""

    A: Tensor
    B: Tensor


def forward(case: Case, probes: Params | None = None) -> tuple[Tensor, Params]:
    """The outputs, and the input of each layer by name; probes[name] is added to that layer's output."""
    x, inputs = case.inputs, {}
    for position, stage in enumerate(case.stages):
        name = str(position)
        if name in case.layers:
            inputs[name] = x
        x = apply_stage(stage, name, case.params, x)
        if probes is not None and name in case.layers:
            x = x + probes[name]
    return x, inputs


def number_of_terms(case: Case) -> int:
    return len(terms(case.likelihood, case.model(case.params, case.inputs)))


def loss(case: Case, params: Params | None = None) -> Tensor:
    """(1/M) Σ_m -log p(y_m | f_m), a scalar."""
    outputs = case.model(case.params if params is None else params, case.inputs)
    return negative_log_likelihood(case.likelihood, outputs, case.targets, **case.likelihood_options).mean()


def gradients(case: Case) -> Params:
    """∇ loss with respect to each parameter, in its shape."""
    return torch.func.grad(lambda params: loss(case, params))(case.params)


def output_gradients(case: Case, cotangents: Tensor | None = None) -> Params:
    """g of each layer: the derivative of Σ cotangents * outputs, or of Σ_m -log p(y_m | f_m), in the layer's output."""

    def total(probes: Params) -> Tensor:
        outputs, _ = forward(case, probes)
        if cotangents is not None:
            return (cotangents * outputs).sum()
        return negative_log_likelihood(case.likelihood, outputs, case.targets, **case.likelihood_options).sum()

    return torch.func.grad(total)(_zero_probes(case))


def output_jacobians(case: Case) -> Params:
    """The Jacobian of each output of each term with respect to each layer's output s: [M, K, *s.shape]."""
    return torch.func.jacrev(lambda probes: terms(case.likelihood, forward(case, probes)[0]))(_zero_probes(case))


def factors(case: Case, estimator: str) -> dict[str, Factors]:
    """(A, B) of each layer; B = (1/M) Σ g gᵀ over rows (and columns c) with g at the true targets ("empirical"), with
    g = J_mᵀ S_m[:, c] and S Sᵀ the output Hessian ("exact"), or B = I ("forward_only").
    """
    outputs, inputs = forward(case)
    M, result = number_of_terms(case), {}
    if estimator == "exact":
        columns = output_hessian_root(case.likelihood, outputs, **case.likelihood_options)
        jacobians = output_jacobians(case).items()
        vectors = {name: torch.einsum("mkc,mk...->mc...", columns, j).flatten(0, 1) for name, j in jacobians}
    elif estimator == "empirical":
        vectors = {name: g[None] for name, g in output_gradients(case).items()}
    for name, layer in case.layers.items():
        d = layer.weight_shape[0] // layer.groups
        B = torch.eye(d, dtype=torch.float64).expand(layer.groups, d, d)
        if estimator != "forward_only":
            rows = [layer_output_rows(layer, g) for g in vectors[name]]
            B = sum(torch.einsum("gri,grj->gij", r, r) for r in rows) / M
        result[name] = Factors(second_moment(layer_input_rows(layer, inputs[name])), B)
    return result


def _zero_probes(case: Case) -> Params:
    _, inputs = forward(case)
    outputs = {name: apply_stage(layer, name, case.params, inputs[name]) for name, layer in case.layers.items()}
    return {name: torch.zeros_like(s) for name, s in outputs.items()}


def flatten(tree: Params) -> Tensor:
    """All entries of a flat dictionary in its order, as one vector [P]."""
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()])


def gradient_matrix(case: Case, name: str, tree: Params) -> Tensor:
    """The entries of a layer as [W b]: [groups, d_out / groups, d_in (+ 1)], d_in = C / groups * kh * kw."""
    layer, weight = case.layers[name], tree[f"{name}.weight"]
    matrix = weight.reshape(layer.groups, len(weight) // layer.groups, -1)
    return torch.cat([matrix, tree[f"{name}.bias"].reshape(layer.groups, -1, 1)], -1) if layer.bias else matrix


def layer_gradients(case: Case, name: str, matrix: Tensor) -> Params:
    """The inverse of ``gradient_matrix``: the layer's weight and bias in their shapes, by parameter name."""
    layer = case.layers[name]
    weight = matrix[..., :-1] if layer.bias else matrix
    bias = {f"{name}.bias": matrix[..., -1].reshape(-1)} if layer.bias else {}
    return {f"{name}.weight": weight.reshape(layer.weight_shape), **bias}


def gauss_newton_matrix(case: Case) -> Tensor:
    """(1/M) Σ_m J_mᵀ H_m J_m over all parameters in the order of ``flatten``, [P, P]: the exact Fisher."""
    jacobians = torch.func.jacrev(lambda p: terms(case.likelihood, case.model(p, case.inputs)))(case.params)
    jacobian = torch.cat([j.flatten(2) for j in jacobians.values()], -1)
    outputs = case.model(case.params, case.inputs)
    hessian = output_hessian(case.likelihood, outputs, **case.likelihood_options)
    return torch.einsum("mki,mkl,mlj->ij", jacobian, hessian, jacobian) / len(jacobian)


def gauss_newton_blocks(case: Case, name: str) -> Tensor:
    """The block for [W b] of each group of a layer, in row-major order, [groups, D, D]: what B ⊗ A approximates."""
    matrix, sizes = gauss_newton_matrix(case), [p.numel() for p in case.params.values()]
    numbers = zip(case.params.items(), torch.arange(sum(sizes)).split(sizes), strict=True)
    places = gradient_matrix(case, name, {name: part.reshape(p.shape) for (name, p), part in numbers})
    return torch.stack([matrix[group][:, group] for group in places.flatten(1)])


class Averages(NamedTuple):
    """Refreshes so far and averaged factors."""

    refreshes: int
    averages: dict[str, Factors]


def preconditioned_gradients(case: Case, grads: Params, averages: dict[str, Factors], damping: float) -> Params:
    """(B + δ_B I)⁻¹ G (A + δ_A I)⁻¹ for each layer; the other parameters keep their plain gradients."""
    result = dict(grads)
    for name, (A, B) in averages.items():
        matrix = kronecker_preconditioned(gradient_matrix(case, name, grads), A, B, damping)
        result.update(layer_gradients(case, name, matrix))
    return result


def averaged_factors(case: Case, before: Averages | None, estimator: str, decay: float) -> Averages:
    """The bias-corrected running averages after one more batch."""
    averages = factors(case, estimator)
    t = 1 if before is None else before.refreshes + 1
    rho = (decay - decay**t) / (1 - decay**t)
    if before is not None:
        for name, new in averages.items():
            pairs = zip(before.averages[name], new, strict=True)
            averages[name] = Factors(*[rho * old + (1 - rho) * batch for old, batch in pairs])
    return Averages(t, averages)
