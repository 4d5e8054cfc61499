"""A factor structure written outside of the package goes through all that asks a structure."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import optree
import pytest
import torch

import lrkfac
from lrkfac import diagnose, explain, factor_drift, precondition_by_fisher, ranks_by_trace
from lrkfac.structures import FactorStructure, dense, diagonal, kronecker, low_rank
from lrkfac.testing import check_structure, check_transformation
from tests import cases
from tests.core.curvature.test_schedule import problem
from tests.transforms.test_precondition import layers_and_evaluate

MLP, GROUPS = cases.LINEAR[0], cases.CONVOLUTION[3]


class Halves(NamedTuple):
    """``[[first, 0], [0, second]]``."""

    first: torch.Tensor
    second: torch.Tensor

    @property
    def dimension(self):
        return len(self.first) + len(self.second)

    def matvec(self, x):
        return torch.cat([self.first @ x[: len(self.first)], self.second @ x[len(self.first) :]])

    def of_rows(self, x):
        return self.matvec(x.mT).mT

    def to_dense(self):
        return torch.block_diag(self.first, self.second)

    def trace(self):
        return self.first.trace() + self.second.trace()

    def shifted(self, shift):
        return Halves(*[x + shift * torch.eye(len(x), dtype=x.dtype, device=x.device) for x in self])


class HalvesState(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor
    steps: torch.Tensor

    def spectrum(self):
        values = torch.cat([torch.linalg.eigvalsh(x) for x in self[:2]]).clamp(min=0)
        return values.sort(descending=True).values, values.new_zeros(())

    def inner(self, other):
        return sum((x * y).sum((-2, -1)) for x, y in zip(self[:2], other[:2], strict=True))


@dataclass(frozen=True)
class TwoBlocks(FactorStructure):
    def init(self, dimension, like):
        sizes = (dimension + 1) // 2, dimension // 2
        return HalvesState(*[like.new_zeros(n, n) for n in sizes], like.new_zeros((), dtype=torch.int64))

    def update(self, state, covariance, decay):
        t, matrix, n = state.steps + 1, covariance.dense(), state.first.shape[-1]
        kept = (decay - decay**t) / (1 - decay**t)
        new = matrix[:n, :n], matrix[n:, n:]
        return HalvesState(*[kept * x + (1 - kept) * y for x, y in zip(state[:2], new, strict=True)], t)

    def operator(self, state):
        return Halves(*state[:2])

    def inverse(self, state, damping):
        return Halves(*map(torch.linalg.inv, self.operator(state).shifted(damping)))


CUSTOM = kronecker(TwoBlocks(), TwoBlocks())


def trained(tx, params, evaluate, steps=2):
    states = [tx.init(params)]
    for i in range(steps):
        e = evaluate(optree.tree_map(lambda p, i=i: (1 + i / 4) * p, params))
        updates, state = tx.update(e.grads, states[-1], params, evaluation=e)
        states.append(state)
    return updates, states, e


def test_laws():
    check_structure(TwoBlocks())
    check_structure(TwoBlocks(), dimension=1)


@pytest.mark.parametrize("structure, case", [
    (kronecker(TwoBlocks(), low_rank(1)), GROUPS), (kronecker(TwoBlocks(), diagonal(), corrected=True), MLP),
    (kronecker(low_rank(1), TwoBlocks(), treatment="reduce"), MLP)], ids=["expand", "corrected", "reduce"])  # fmt: skip
def test_laws_of_the_transformation(structure, case):
    layers, evaluate = layers_and_evaluate(case, "empirical")
    tx = precondition_by_fisher(layers, structure, damping=0.1)
    check_transformation(tx, case.params, lambda p: ((e := evaluate(p)).grads, {"evaluation": e}))


def test_steps_are_those_of_dense_factors_without_the_corners():
    layers, params, evaluate = problem(3, "empirical")
    updates, states, e = trained(precondition_by_fisher(layers, CUSTOM, damping=0.1), params, evaluate)
    plain = trained(precondition_by_fisher(layers, kronecker(dense(), dense())), params, evaluate)[1][-1]
    for name, (B, A) in plain.factors.items():
        masked = [torch.block_diag(M.matrix[:4, :4], M.matrix[4:, 4:]) for M in (B, A)]
        pi = (masked[1].trace() / masked[0].trace()).sqrt()
        shifts = 0.1**0.5 / pi, 0.1**0.5 * pi
        left, right = (torch.linalg.inv(M + s * torch.eye(7)) for M, s in zip(masked, shifts, strict=True))
        torch.testing.assert_close(updates[name], left @ lrkfac.materialize(e.grads)[name] @ right)
        torch.testing.assert_close(states[-1].dampings[name], torch.stack(shifts))


def test_what_describes_a_structure_asks_it():
    layers, params, evaluate = problem(3, "empirical")
    tx = precondition_by_fisher(layers, CUSTOM)
    _, (start, old, new), _ = trained(tx, params, evaluate)
    diagnosis, drift = diagnose(new, layers, previous=old), factor_drift(old.factors, new.factors)
    ranks = ranks_by_trace(new, layers, share=0.9)
    for name in params:
        angles = []
        for i, side in enumerate(("B", "A")):
            M, N = (TwoBlocks().operator(state.factors[name][i]).to_dense() for state in (new, old))
            numbers, delta = diagnosis.layers[name].numbers[side], new.dampings[name][i]
            values = torch.linalg.eigvalsh(M).flip(0)
            torch.testing.assert_close(diagnosis.layers[name].eigenvalues[side], values)
            torch.testing.assert_close(numbers["drift"], (M - N).norm() / M.norm())
            torch.testing.assert_close(numbers["effective_dimension"], (values / (values + delta)).sum())
            torch.testing.assert_close(numbers["condition"], (values[0] + delta) / (values[-1] + delta))
            angles.append(math.acos((M * N).sum() / (M.norm() * N.norm())))
            assert values[: ranks[name]].sum() >= 0.9 * values.sum()
        assert drift[name].item() == pytest.approx(max(angles))
    explanation = explain(layers, CUSTOM)
    assert explanation.total.bytes == sum(x.numel() * x.itemsize for x in optree.tree_leaves(start))
    assert {cost.structure for cost in explanation.layers.values()} == {"A TwoBlocks, B TwoBlocks"}
    assert "TwoBlocks" in str(explanation) and str(diagnosis)
    with pytest.raises(ValueError, match="rank: the structure decides for every layer"):
        explain(layers, CUSTOM, budget=10_000)
    mixed = lambda layer: CUSTOM if layer.name == "l0" else None  # noqa: E731
    assert set(explain(layers, mixed, budget=10_000).ranks) == {"l1", "l2"}
