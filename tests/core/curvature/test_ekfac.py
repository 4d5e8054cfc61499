"""Corrected eigenvalues: the diagonal of the explicit block in the factors' basis, and textbook EKFAC."""

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lrkfac
from lrkfac import precondition_by_fisher as by_fisher
from lrkfac.core.curvature.assignment import blocks
from lrkfac.core.curvature.blocks import initial_state
from lrkfac.core.curvature.refresh import refresh
from lrkfac.core.linalg.eigenbasis import EigenbasisKronecker
from lrkfac.core.linalg.moments import Moments
from lrkfac.structures import dense, diagonal, kronecker, low_rank, low_rank_plus_diagonal
from lrkfac.testing import seeds
from lrkfac.testing.strategies import corrected_kroneckers
from tests import cases, reference_networks
from tests.transforms.test_precondition import layers_and_evaluate

FACTORS = {
    "dense": (dense(), dense()),
    "low rank": (low_rank(2), low_rank(2)),
    "low rank plus diagonal": (low_rank(2), low_rank_plus_diagonal(1)),
    "mixed": (low_rank_plus_diagonal(2), dense()),
    "diagonal": (diagonal(), diagonal()),
}
CASES = [cases.LINEAR[0], *cases.SEQUENCE[::2], *cases.CONVOLUTION]


def moments(matrix, u, v):
    """Of a matrix along the vectors of both sides, by all of its entries."""
    cube = matrix.reshape(len(u), len(v), len(u), len(v))
    return Moments(
        torch.einsum("oa,ib,oipj,pa,jb->ab", u, v, cube, u, v),
        torch.einsum("oa,oipi,pa->a", u, cube, u),
        torch.einsum("ib,oioj,jb->b", v, cube, v),
        matrix.trace(),
    )


def is_the_part_of(block, found):
    """``found`` is the nearest to ``block`` of all operators of its form along its vectors."""
    u, v = found.output_vectors, found.input_vectors
    for w in (u, v):
        torch.testing.assert_close(w.mT @ w, torch.eye(w.shape[1]).double(), rtol=0, atol=1e-10)
    more_out, more_in = (w.shape[0] - w.shape[1] for w in (u, v))
    kept, output, input, scale = moments(block, u, v)
    rest = scale - output.sum() - input.sum() + kept.sum()
    expected = kept, output - kept.sum(1), input - kept.sum(0), rest, scale
    parts = found.kept, found.output * more_in, found.input * more_out, found.rest * more_out * more_in, found.trace()
    torch.testing.assert_close(parts, expected, rtol=0, atol=1e-9 * float(scale))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", FACTORS)
def test_average_is_the_diagonal_of_the_explicit_block(case, name):
    """With and without sharing, for groups, whatever holds the factors.

    Two batches with decay ``ρ`` weigh ``ρ / (1 + ρ)`` and ``1 / (1 + ρ)``: the trace exactly, though the bases turn.
    """
    layers, evaluate = layers_and_evaluate(case)
    second, decay = case._replace(params={k: 1.5 * p for k, p in case.params.items()}), 0.6
    statistics = [evaluate(c.params).statistics for c in (case, second)]
    for block in blocks(layers, kronecker(*FACTORS[name], corrected=True), None):
        (layer,), state = block.layers, initial_state(block, [case.params[p.path] for p in layers.parameters])
        old, new = (reference_networks.gauss_newton_blocks(c, layer.name) for c in (case, second))
        for one, expected in zip(statistics, (old, (decay * old + new) / (1 + decay)), strict=True):
            state = refresh([block], {block.name: state}, one, {block.name: 0.1}, decay)[block.name]
            for i in range(layer.groups):
                found = optree.tree_map(lambda x, i=i: x[i], state.average) if layer.groups > 1 else state.average
                torch.testing.assert_close(found.average.trace(), expected[i].trace(), rtol=1e-9, atol=0)
                values = torch.linalg.eigvalsh(found.average.to_dense())
                assert values[0] >= -1e-12 * values[-1]
                if one is statistics[0] or name == "diagonal":  # the only bases that do not turn
                    is_the_part_of(expected[i], found.average)


@pytest.mark.parametrize("case", cases.LINEAR, ids=lambda case: case.name)
def test_dense_factors_without_sharing_are_textbook_ekfac(case):
    """``U_B ((U_Bᵀ G U_A) / (S + λ)) U_Aᵀ`` with ``S = E (U_Bᵀ G_n U_A)²``."""
    layers, evaluate = layers_and_evaluate(case)
    tx, e = by_fisher(layers, kronecker(dense(), dense(), corrected=True), damping=0.03), evaluate(case.params)
    found, _ = tx.update(e.grads, tx.init(case.params), case.params, evaluation=e)
    outputs, inputs = reference_networks.forward(case)
    roots = reference_networks.output_hessian_root(case.likelihood, outputs, **case.likelihood_options)
    factors, jacobians = reference_networks.factors(case, "exact"), reference_networks.output_jacobians(case)
    for name, layer in case.layers.items():
        A, B = (torch.linalg.eigh(factor[0]).eigenvectors for factor in factors[name])
        (a,) = reference_networks.layer_input_rows(layer, inputs[name])
        g = torch.einsum("mkc,mkno->cno", roots, jacobians[name])  # only those of the own example are not 0
        S = torch.einsum("cno,ni->cnoi", g @ B, a @ A).square().sum((0, 1)) / len(a)
        G = reference_networks.gradient_matrix(case, name, e.grads)[0]
        natural = B @ ((B.T @ G @ A) / (S + 0.03)) @ A.T
        for path, x in reference_networks.layer_gradients(case, name, natural[None]).items():
            torch.testing.assert_close(found[path], x, rtol=1e-8, atol=1e-10)


@given(corrected_kroneckers(36, torch.float64), st.data(), seeds)
def test_moments_in_other_bases_are_those_of_the_matrix(operator, data, seed):
    generator, matrix = torch.Generator().manual_seed(seed), operator.to_dense()
    u, v = (
        torch.linalg.qr(torch.randn(d, data.draw(st.integers(1, d)), generator=generator).double()).Q
        for d in (len(operator.output_vectors), len(operator.input_vectors))
    )
    torch.testing.assert_close(operator.moments(u, v), moments(matrix, u, v), rtol=1e-9, atol=1e-11)
    same = operator.moments(operator.output_vectors, operator.input_vectors)
    torch.testing.assert_close(same.kept, operator.kept, rtol=1e-9, atol=1e-11)


def test_bases_are_orthonormal_where_directions_are_missing():
    state = low_rank_plus_diagonal(3).init(6, torch.ones(()).double())
    vectors = torch.randn(6, 3).double() * torch.tensor([1.0, 0.0, 1.0])
    u = low_rank_plus_diagonal(3).basis(state._replace(vectors=vectors))
    torch.testing.assert_close(u.mT @ u, torch.eye(3).double())


def test_applied_in_float32_the_inverse_stays_positive():
    """Also where eigenvalues are further apart than the precision."""
    u, v = (torch.linalg.qr(torch.randn(d, 2)).Q for d in (20, 30))
    small = torch.full((2,), 1e-9)
    apart = lrkfac.linalg.inverse(EigenbasisKronecker(u, v, torch.ones(2, 2), small, small, torch.tensor(1e-9)))
    for x in (torch.outer(a, b) for a in u.mT for b in v.mT):
        assert (x * apart.two_sided(x)).sum() > 0
