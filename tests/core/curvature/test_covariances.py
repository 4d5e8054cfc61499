"""Factors by their action, against the unfolded rows of the reference."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import jacrev

import lrkfac
from lrkfac import evaluator, find_layers, precondition_by_fisher
from lrkfac.core.curvature import examples
from lrkfac.core.curvature.assignment import blocks
from lrkfac.core.curvature.covariances import kronecker_factors
from lrkfac.core.curvature.examples import LayerStatistics
from lrkfac.core.curvature.kronecker import KroneckerStructure
from lrkfac.core.layers.matrix import split_groups
from lrkfac.core.linalg.covariances import Covariance
from lrkfac.core.linalg.moments import RandomMatrix
from lrkfac.structures import dense, kronecker
from lrkfac.testing import layers
from tests import reference
from tests.dispatch import LargestTensor
from tests.tensors import normal

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def largest(function):
    with LargestTensor() as mode:
        function()
    return mode.numel


def is_the_matrix(covariance, expected, dtype=torch.float64, size=None):
    """Everything by which a structure knows a factor; ``size`` is that of what was summed, which may cancel."""
    assert isinstance(covariance, Covariance)
    vectors, size = normal(len(expected), 3).to(dtype), expected.norm() if size is None else size
    for found, matrix in (
        (covariance.dense(), expected),
        (covariance.matvec(vectors), expected @ vectors.double()),
        (covariance.diagonal(), expected.diagonal()),
        (covariance.trace(), expected.trace()),
    ):
        assert found.shape == matrix.shape and found.dtype == dtype
        assert (found.double() - matrix).norm() <= TOLERANCE[dtype] * (1e-6 + 3 * size)


def input_rows(layer, inputs, options):
    """[groups, n, positions, d] from the reference, for a prepared input, in which uneven padding is done."""
    if layer.kind == "linear":
        rows = reference.linear_input_rows(inputs, layer.bias is not None)
    else:
        _, stride, padding, dilation, groups, *_ = options
        even = [before for before, after in padding] if all(x == y for x, y in padding) else [0, 0]
        bias = layer.bias is not None
        rows = reference.conv2d_input_rows(inputs, layer.weight.shape, stride, even, dilation, groups, bias)
    return rows.unflatten(1, (len(inputs), -1))


def output_rows(layer, gradients):
    linear = layer.kind == "linear"
    rows = reference.linear_output_rows(gradients) if linear else reference.conv2d_output_rows(gradients, layer.groups)
    return rows.unflatten(1, (len(gradients), -1))


def used_twice(case, other_settings=False):
    """The layer with two uses, its inputs, gradients of two samples, and the rows of inputs and of the first sample."""
    layer, (options,) = case.layer, case.layer.options
    more = options
    if other_settings and layer.kind == "conv2d":
        more = (options[0], (1, 1), ((2, 2), (2, 2)), *options[3:])
    layer = replace(layer, options=(options, more), kinds=layer.kinds * 2, sites=layer.sites * 2)
    inputs, gradients = (case.inputs, case.inputs.flip(-1)), (case.output_gradients, case.output_gradients.flip(0))
    a = torch.cat([input_rows(layer, x, o) for x, o in zip(inputs, layer.options, strict=True)], 2)
    g = torch.cat([output_rows(layer, g) for g in gradients], 2)
    return layer, inputs, tuple(torch.stack([g, 2 * g]) for g in gradients), a, g


def of_groups(layer, inputs, gradients):
    inputs, gradients = split_groups(layer, inputs), split_groups(layer, gradients)
    if layer.groups == 1:
        return [(inputs, gradients)]
    return [(tuple(a[i] for a in inputs), tuple(g[i] for g in gradients)) for i in range(layer.groups)]


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.bfloat16])
@given(case=layers(), treatment=st.sampled_from(["expand", "reduce"]), scale=st.floats(0.1, 10))
def test_factors_are_those_of_the_rows(dtype, case, treatment, scale):
    """Samples are rows; uses of one weight are rows, too, or positions. Half precision is summed in float32."""
    case = case._replace(inputs=case.inputs.to(dtype), output_gradients=case.output_gradients.to(dtype))
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    layer, inputs, gradients, a, g = used_twice(case, other_settings=treatment == "expand")
    sizes = [x.square().sum((1, 2, 3)) for x in (a, g)]
    positions = a.shape[2] * len(case.inputs) if treatment == "expand" else len(case.inputs)
    if treatment == "reduce":
        a, g = a.mean(2, keepdim=True), g.sum(2, keepdim=True)
    A, B = (torch.einsum("gnti,gntj->gij", x, x) for x in (a, g))
    scale = torch.tensor(scale, dtype=wide)
    for i, one in enumerate(of_groups(layer, inputs, gradients)):
        found = kronecker_factors(layer, *one, scale, treatment)
        is_the_matrix(found.input, A[i] / positions, wide, sizes[0][i] / positions)
        is_the_matrix(found.output, 5 * scale.double() * B[i], wide, 5 * scale * sizes[1][i] * g.shape[2])


@pytest.mark.parametrize("pooled", [torch.mean, torch.sum])
def test_reduce_is_exact_for_pooling_in_a_linear_network(pooled):
    """``B ⊗ A = JᵀJ / n`` for each layer and any number of examples, with squared loss (section 3.3 of the paper)."""
    params, inputs = {"0": normal(4, 3), "1": normal(3, 4, seed=1), "2": normal(2, 3, seed=2)}, normal(6, 5, 3)
    model = lambda w, x: F.linear(pooled(F.linear(F.linear(x, w["0"]), w["1"]), dim=1), w["2"])  # noqa: E731
    described = find_layers(model, params, inputs, strict=True)
    s = evaluator(model, lrkfac.gaussian(), described, "exact")(params, inputs, normal(6, 2)).statistics
    for name, J in jacrev(model)(params, inputs).items():
        B, A = kronecker_factors(described[name], s.inputs[name], s.output_gradients[name], s.scale, "reduce")
        J = J.flatten(0, 1).flatten(1)
        torch.testing.assert_close(torch.kron(B.dense(), A.dense()), J.mT @ J / len(inputs))


def test_no_rows_are_unfolded_and_no_matrix_is_formed():
    x, params, one = normal(4, 16, 20, 20), {"w": normal(8, 16, 3, 3), "b": normal(8)}, torch.tensor(1.0)
    (layer,) = find_layers(lambda p, x: F.conv2d(x, p["w"], p["b"], padding=1), params, x)
    covariance, V = kronecker_factors(layer, (x,), (), one).input, normal(layer.d_in, 4)
    assert largest(lambda: (covariance.matvec(V), covariance.diagonal())) <= x.numel()
    assert largest(lambda: kronecker_factors(layer, (x,), (normal(1, 4, 8, 20, 20),), one, "reduce")) <= x.numel()
    x, d = normal(8, 512), 512
    (layer,) = find_layers(lambda p, x: F.linear(x, p["w"], p["b"]), {"w": normal(600, d), "b": normal(600)}, x)
    B, A = kronecker_factors(layer, (x,), (normal(1, 8, 600),), one)
    assert largest(lambda: (A.matvec(normal(d + 1, 4)), A.diagonal())) <= 2 * x.numel()
    assert largest(lambda: (B.matvec(normal(600, 4)), B.diagonal(), B.trace())) <= 8 * 600


def test_a_tied_weight_is_the_product_of_its_partial_traces():
    """``(Σ tr(Aₖ) Bₖ) ⊗ (Σ tr(Bₖ) Aₖ) / Σ tr(Aₖ) tr(Bₖ)`` over its two kinds of use."""
    params, numbers = {"w": torch.randn(5, 3).double()}, torch.randint(5, (6, 4))
    model = lambda p, x: F.embedding(x, p["w"]).tanh().mean(1) @ p["w"].T  # noqa: E731
    layer = (described := find_layers(model, params, numbers))["w"]
    e = evaluator(model, lrkfac.categorical(), described, "exact")(params, numbers, numbers[:, 0])
    inputs, gradients, scale = e.statistics.inputs["w"], e.statistics.output_gradients["w"], e.statistics.scale
    apart = []
    for i, kind in enumerate(layer.kinds):
        use = replace(layer, kinds=(kind,), options=(layer.options[i],), sites=(layer.sites[i],))
        factors = kronecker_factors(use, (inputs[i],), (gradients[i],), scale)
        apart.append((factors.output.dense(), factors.input.dense()))
    both = kronecker_factors(layer, inputs, gradients, scale)
    total = sum(b.trace() * a.trace() for b, a in apart)
    expected = torch.kron(sum(a.trace() * b for b, a in apart), sum(b.trace() * a for b, a in apart)) / total
    torch.testing.assert_close(torch.kron(both.output.dense(), both.input.dense()), expected)


# Second moments of examples' gradients, on every way to compute them --------------------------------------

ONE = torch.tensor(1.0).double()


def basis(d, r, seed):
    return torch.linalg.qr(normal(d, r, seed=seed)).Q


def are_those_of(found, matrices, u, v, scale):
    """``matrices`` ``[n, d_out, d_in]``."""
    left, right = u.mT @ matrices, matrices @ v
    whole = matrices.square().sum()
    expected = (left @ v).square().sum(0), left.square().sum((0, 2)), right.square().sum((0, 1)), whole
    for one, value in zip(found, expected, strict=True):
        torch.testing.assert_close(one, scale * value, rtol=1e-9, atol=1e-10 * float(1e-6 + scale * whole))


@given(layers(), st.data())
def test_every_kind_group_and_use(case, data):
    layer, inputs, gradients, a, g = used_twice(case)
    matrices, scale = torch.einsum("gnto,gnti->gnoi", g, a), 0.3 * ONE
    u, v = (basis(d, data.draw(st.integers(1, d)), d) for d in (layer.d_out, layer.d_in))
    for one, of_group in zip(of_groups(layer, inputs, gradients), matrices, strict=True):
        found = LayerStatistics(layer, *one, scale)
        assert isinstance(found, RandomMatrix)
        are_those_of(found.moments(u, v), torch.cat([of_group, 2 * of_group]), u, v, scale)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positions, way", [((), "_without_sharing"), ((3,), "_by_gram_matrices"), ((40,), None)])
def test_linear_layers(positions, way, bias, monkeypatch):
    """One row for each example, few and many."""
    x, params = normal(6, *positions, 12), {"w": normal(15, 12)} | ({"b": normal(15)} if bias else {})
    (layer,) = find_layers(lambda p, x: F.linear(x, p["w"], p.get("b")), params, x)
    g = normal(2, 6, *positions, 15, seed=1)
    u, v, taken = basis(15, 4, 2), basis(layer.d_in, 5, 3), []
    for name in ("_without_sharing", "_by_gram_matrices"):
        real = getattr(examples, name)
        monkeypatch.setattr(examples, name, lambda *args, name=name, real=real: taken.append(name) or real(*args))
    found = LayerStatistics(layer, (x,), (g,), ONE).moments(u, v)
    assert set(taken) == ({way} if way else set())
    a = F.pad(x, (0, int(bias)), value=1.0).reshape(6, -1, 12 + bias)
    are_those_of(found, torch.einsum("knto,nti->knoi", g.reshape(2, 6, -1, 15), a).flatten(0, 1), u, v, 1.0)


def test_matrices_are_formed_for_a_few_examples_at_a_time_and_of_linear_layers_not_at_all():
    x, g, u, v = normal(16, 8, 3, 3), normal(1, 16, 8, 1, 1), basis(8, 2, 0), basis(72, 3, 1)
    (layer,) = find_layers(lambda p, x: F.conv2d(x, p["w"]), {"w": normal(8, 8, 3, 3)}, x)
    found = LayerStatistics(layer, (x,), (g,), ONE)
    assert largest(lambda: found.moments(u, v)) <= 16 * 8 * 10 + 8 * 72
    are_those_of(found.moments(u, v), torch.einsum("no,ni->noi", g.reshape(16, 8), x.flatten(1)), u, v, 1.0)
    x, g, u, v = normal(8, 300), normal(1, 8, 400), basis(400, 4, 0), basis(300, 4, 1)
    (layer,) = find_layers(lambda p, x: F.linear(x, p["w"]), {"w": normal(400, 300)}, x)
    assert largest(lambda: LayerStatistics(layer, (x,), (g,), ONE).moments(u, v)) <= 8 * 400


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_stay_products_and_estimators_without_gradients_are_refused(tied):
    def model(p, x):
        return F.linear(torch.tanh(F.embedding(x, p["table"])), p["table"] if tied else p["head"])[:, 0]

    params = {"table": normal(7, 3)} | ({} if tied else {"head": normal(7, 3)})
    corrected, tokens = kronecker(dense(), dense(), corrected=True), torch.tensor([[1, 2]])
    described = find_layers(model, params, tokens)
    structures = {block.name: block.structure for block in blocks(described, corrected, None)}
    assert isinstance(structures["table"], KroneckerStructure)
    if not tied:
        assert type(structures["head"]) is type(corrected)
        evaluate = evaluator(model, lrkfac.categorical(), described, "forward_only")
        tx, e = precondition_by_fisher(described, corrected), evaluate(params, tokens, tokens[:, 0])
        with pytest.raises(ValueError, match="forward_only"):
            tx.update(e.grads, tx.init(params), params, evaluation=e)
