"""Operators on trees: every function of ``lrkfac.linalg`` against the dense matrix of all covered parameters."""

import optree
import pytest
import torch

import lrkfac
from lrkfac import linalg
from lrkfac.curvature import from_state
from tests.core.inference.test_from_state import GROUPS, MLP, SHIFT, STRUCTURES, evaluations, last_step
from tests.tensors import close

CASES = [(MLP, name) for name in ("dense", "low rank", "corrected", "full")]
CASES += [(GROUPS, "low rank"), (GROUPS, "unit"), (SHIFT, "layer")]


def flat(tree):
    return torch.cat([x.reshape(-1) for x in optree.tree_leaves(tree)])


@pytest.mark.parametrize("case, name", CASES, ids=lambda x: x if isinstance(x, str) else x.name)
def test_functions_of_operators_are_those_of_the_dense_matrix(case, name):
    layers, _ = evaluations(case)
    state = last_step(lrkfac.precondition_by_fisher(layers, STRUCTURES[name]), case)[1]
    start = from_state(state, layers)
    covered = flat({key: torch.full_like(x, key not in start.uncovered) for key, x in case.params.items()}) > 0
    b = {key: torch.randn_like(x) for key, x in case.params.items()}
    damping = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    operator = linalg.damped(linalg.scale(start, 2.0), damping)
    M = (2 * start.to_dense() + damping * torch.eye(len(covered), dtype=torch.float64))[covered][:, covered]
    row = flat(b)[covered]
    close(linalg.trace(operator), M.trace(), rtol=1e-9)
    close(linalg.quadratic_form(operator, b), row @ M @ row, rtol=1e-9)
    close(flat(linalg.diagonal(operator))[covered], M.diagonal(), rtol=1e-9)
    close(flat(linalg.solve(operator, b))[covered], torch.linalg.solve(M, row), rtol=1e-8)
    close(
        flat(linalg.inverse(start, 0.3, exact=True).product(b))[covered],
        torch.linalg.solve(start.to_dense()[covered][:, covered] + 0.3 * torch.eye(len(row), dtype=torch.float64), row),
        rtol=1e-8,
    )
    close(linalg.logdet(operator), torch.logdet(M), rtol=1e-9)
    found, expected = (torch.autograd.grad(x, damping)[0] for x in (linalg.logdet(operator), torch.logdet(M)))
    close(found, expected, rtol=1e-8)
    for half, inverted in ((linalg.root(operator), False), (linalg.inverse_root(operator), True)):
        image = flat(half.matvec(half.rmatvec(b)))
        close(image[covered], torch.linalg.solve(M, row) if inverted else M @ row, rtol=1e-8)
        assert not image[~covered].any()
    close(flat(linalg.sample(operator, b)), flat(linalg.root(operator).matvec(b)))


def test_an_indefinite_block_is_refused():
    layers, _ = evaluations(MLP)
    start = from_state(last_step(lrkfac.precondition_by_fisher(layers, STRUCTURES["dense"]), MLP)[1], layers)
    with pytest.raises(ValueError, match="eigenvalue"):
        linalg.logdet(linalg.scale(start, -1.0))
