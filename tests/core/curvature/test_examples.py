"""Second moments of examples' gradients, against the matrices themselves, on every way to compute them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import lrkfac
from lrkfac import find_layers, precondition_by_fisher
from lrkfac.core.curvature import examples
from lrkfac.core.curvature.assignment import blocks
from lrkfac.core.curvature.examples import LayerStatistics
from lrkfac.core.curvature.kronecker import KroneckerStructure
from lrkfac.core.layers.matrix import split_groups
from lrkfac.core.linalg.moments import RandomMatrix
from lrkfac.structures import dense, kronecker
from lrkfac.testing import layers
from tests.core.curvature.test_covariances import input_rows, largest, normal, output_rows


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
    layer, n, scale = case.layer, len(case.inputs), torch.tensor(0.3, dtype=torch.float64)
    layer = replace(layer, kinds=layer.kinds * 2, options=layer.options * 2)
    inputs = (case.inputs, case.inputs.flip(-1))
    gradients = tuple(torch.stack([g, 2 * g]) for g in (case.output_gradients, case.output_gradients.cos()))
    a = torch.cat([input_rows(layer, x, layer.options[0]).unflatten(1, (n, -1)) for x in inputs], 2)
    g = torch.cat([output_rows(layer, g[0]).unflatten(1, (n, -1)) for g in gradients], 2)
    matrices = torch.einsum("gnto,gnti->gnoi", g, a)
    u, v = (basis(d, data.draw(st.integers(1, d)), d) for d in (layer.d_out, layer.d_in))
    split = [split_groups(layer, x) for x in (inputs, gradients)]
    for i in range(layer.groups):
        one = [tuple(x[i] for x in uses) if layer.groups > 1 else uses for uses in split]
        found = LayerStatistics(layer, *one, scale)
        assert isinstance(found, RandomMatrix)
        are_those_of(found.moments(u, v), torch.cat([matrices[i], 2 * matrices[i]]), u, v, scale)


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
    found = LayerStatistics(layer, (x,), (g,), torch.tensor(1.0).double()).moments(u, v)
    assert set(taken) == ({way} if way else set())
    a = x.reshape(6, -1, 12)
    a = torch.cat([a, torch.ones_like(a[..., :1])], 2) if bias else a
    are_those_of(found, torch.einsum("knto,nti->knoi", g.reshape(2, 6, -1, 15), a).flatten(0, 1), u, v, 1.0)


def test_matrices_are_formed_for_a_few_examples_at_a_time():
    x, w = normal(16, 8, 3, 3), normal(8, 8, 3, 3)
    (layer,) = find_layers(lambda p, x: F.conv2d(x, p["w"]), {"w": w}, x)
    g = normal(1, 16, 8, 1, 1)
    found = LayerStatistics(layer, (x,), (g,), torch.tensor(1.0).double())
    u, v = basis(8, 2, 0), basis(72, 3, 1)
    assert largest(lambda: found.moments(u, v)) <= 16 * 8 * 10 + 8 * 72
    a = x.flatten(1)
    are_those_of(found.moments(u, v), torch.einsum("no,ni->noi", g.reshape(16, 8), a), u, v, 1.0)


def test_linear_layers_form_no_matrices():
    x, g = normal(8, 300), normal(1, 8, 400)
    (layer,) = find_layers(lambda p, x: F.linear(x, p["w"]), {"w": normal(400, 300)}, x)
    statistics, u, v = (
        LayerStatistics(layer, (x,), (g,), torch.tensor(1.0).double()),
        basis(400, 4, 0),
        basis(300, 4, 1),
    )
    assert largest(lambda: statistics.moments(u, v)) <= 8 * 400


CORRECTED = kronecker(dense(), dense(), corrected=True)


def test_estimators_without_gradients_are_refused():
    params, x = {"a": normal(3, 5)}, normal(4, 5)
    model = lambda p, x: F.linear(x, p["a"])  # noqa: E731
    described = find_layers(model, params, x)
    e = lrkfac.evaluator(model, lrkfac.categorical(), described, "forward_only")(params, x, torch.tensor([0, 1, 2, 0]))
    tx = precondition_by_fisher(described, CORRECTED)
    with pytest.raises(ValueError, match="forward_only"):
        tx.update(e.grads, tx.init(params), params, evaluation=e)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_stay_products(tied):
    def model(p, x):
        return F.linear(torch.tanh(F.embedding(x, p["table"])), p["table"] if tied else p["head"])

    params = {"head": normal(7, 3), "table": normal(7, 3)}
    params = {"table": params["table"]} if tied else params
    held = {b.name: b.structure for b in blocks(find_layers(model, params, torch.tensor([[1, 2]])), CORRECTED, None)}
    assert isinstance(held["table"], KroneckerStructure)
    assert tied or type(held["head"]) is type(CORRECTED)
