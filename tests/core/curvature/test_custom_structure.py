"""A factor structure written outside of the package goes through all that asks a structure."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import optree
import pytest
import torch

from lrkfac import diagnose, explain, factor_drift, low_rank_kfac, precondition_by_fisher, ranks_by_trace
from lrkfac.structures import FactorStructure, dense, diagonal, kronecker, low_rank
from lrkfac.testing import check_structure, check_transformation
from tests import cases
from tests.core.curvature.test_refresh import deep
from tests.transforms.test_precondition import layers_and_evaluate

MLP, GROUPS = cases.LINEAR[0], cases.CONVOLUTION[3]


class Halves(NamedTuple):
    """An operator, and with a count the state of a factor."""

    matrix: torch.Tensor
    steps: torch.Tensor

    @property
    def dimension(self):
        return len(self.matrix)

    def matvec(self, x):
        return self.matrix @ x

    def of_rows(self, x):
        return x @ self.matrix

    def to_dense(self):
        return self.matrix

    def trace(self):
        return self.matrix.trace()

    def shifted(self, shift):
        return self._replace(matrix=self.matrix + shift * torch.eye(self.dimension).to(self.matrix))

    def spectrum(self):
        values = torch.linalg.eigvalsh(self.matrix).clamp(min=0)
        return values.sort(descending=True).values, values.new_zeros(())

    def inner(self, other):
        return (self.matrix * other.matrix).sum((-2, -1))


def without_corners(matrix):
    n = (len(matrix) + 1) // 2
    return torch.block_diag(matrix[:n, :n], matrix[n:, n:])


@dataclass(frozen=True)
class TwoBlocks(FactorStructure):
    def init(self, dimension, like):
        return Halves(like.new_zeros(dimension, dimension), like.new_zeros((), dtype=torch.int64))

    def update(self, state, covariance, decay):
        t = state.steps + 1
        kept = (decay - decay**t) / (1 - decay**t)
        return Halves(kept * state.matrix + (1 - kept) * without_corners(covariance.dense()), t)

    def operator(self, state):
        return state

    def inverse(self, state, damping):
        return state._replace(matrix=torch.linalg.inv(state.shifted(damping).matrix))


CUSTOM = kronecker(TwoBlocks(), TwoBlocks())
MIXED = [
    (kronecker(TwoBlocks(), low_rank(1)), GROUPS),
    (kronecker(TwoBlocks(), diagonal(), corrected=True), MLP),
    (kronecker(low_rank(1), TwoBlocks(), treatment="reduce"), MLP),
]


@pytest.mark.parametrize("structure, case", MIXED, ids=["expand", "corrected", "reduce"])
def test_laws(structure, case):
    check_structure(TwoBlocks())
    check_structure(TwoBlocks(), dimension=1)
    layers, evaluate = layers_and_evaluate(case, "empirical")
    tx = precondition_by_fisher(layers, structure, damping=0.1)
    check_transformation(tx, case.params, lambda p: ((e := evaluate(p)).grads, {"evaluation": e}))


def joined(leaves):
    return torch.cat([leaves["w"], leaves["b"][:, None]], 1) if "b" in leaves else leaves["w"]


def test_what_asks_a_structure():
    """Steps are those of dense factors without the corners; drift, numbers and costs are those of these matrices."""
    layers, params, evaluate = deep(3)
    states, plain = [], []
    for structure, reached in ((CUSTOM, states), (kronecker(dense(), dense()), plain)):
        tx = precondition_by_fisher(layers, structure, damping=0.1)
        reached.append(tx.init(params))
        for i in range(2):
            e = evaluate(optree.tree_map(lambda p, i=i: (1 + i / 4) * p, params))
            updates, state = tx.update(e.grads, reached[-1], params, evaluation=e)
            reached.append(state)
        found = updates if structure is CUSTOM else found
    (start, old, new), close = states, torch.testing.assert_close
    diagnosis, drift = diagnose(new, layers, previous=old), factor_drift(old.factors, new.factors)
    ranks = ranks_by_trace(new, layers, share=0.9)
    for layer in layers:
        name = layer.name
        both = [[without_corners(M) for M, _ in state.factors[name]] for state in plain]
        pi = (both[-1][1].trace() / layer.d_in / (both[-1][0].trace() / layer.d_out)).sqrt()
        shifts, angles, needed = torch.stack([0.1**0.5 / pi, 0.1**0.5 * pi]), [], []
        close(new.dampings[name], shifts)
        left, right = (torch.linalg.inv(M + s * torch.eye(len(M))) for M, s in zip(both[-1], shifts, strict=True))
        close(joined(found[name]), left @ joined(e.grads[name]) @ right)
        for N, M, delta, side in zip(*both[1:], shifts, "BA", strict=True):
            numbers, values = diagnosis.layers[name].numbers[side], torch.linalg.eigvalsh(M).flip(0)
            close(diagnosis.layers[name].eigenvalues[side], values)
            close(numbers["drift"], (M - N).norm() / M.norm())
            close(numbers["effective_dimension"], (values / (values + delta)).sum())
            close(numbers["condition"], (values[0] + delta) / (values[-1] + delta))
            angles.append(math.acos((M * N).sum() / (M.norm() * N.norm())))
            needed.append(1 + int((values.cumsum(0) < 0.9 * values.sum()).sum()))
        assert drift[name].item() == pytest.approx(max(angles)) and ranks[name] == max(needed)
    assert low_rank_kfac(layers, 0.1, rank=ranks).init(params)
    explanation = explain(layers, CUSTOM)
    assert explanation.total.bytes == sum(x.numel() * x.itemsize for x in optree.tree_leaves(start))
    assert {cost.structure for cost in explanation.layers.values()} == {"A TwoBlocks, B TwoBlocks"}
    assert "TwoBlocks" in str(explanation) and str(diagnosis)
    with pytest.raises(ValueError, match="rank: the structure decides for every layer"):
        explain(layers, CUSTOM, budget=10_000)
    mixed = explain(layers, lambda layer: CUSTOM if layer.name == "l0" else None, budget=10_000)
    assert set(mixed.ranks) == {"l1", "l2", "out"}
