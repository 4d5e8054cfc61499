"""Second moments of examples' gradients, against the matrices themselves, on every way to compute them."""

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
from lrkfac.core.linalg.moments import RandomMatrix
from lrkfac.structures import dense, kronecker
from lrkfac.testing import layers
from tests.core.curvature.test_covariances import largest, normal, of_groups, used_twice

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
        evaluate = lrkfac.evaluator(model, lrkfac.categorical(), described, "forward_only")
        tx, e = precondition_by_fisher(described, corrected), evaluate(params, tokens, tokens[:, 0])
        with pytest.raises(ValueError, match="forward_only"):
            tx.update(e.grads, tx.init(params), params, evaluation=e)
