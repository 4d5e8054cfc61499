"""What ``orthogonalize_by_fisher`` leaves to its fallback: all parameters but matrices."""

import pytest
import torch
import torch.nn.functional as F

import lrkfac
from lrkfac import orthogonalize_by_fisher
from lrkfac.transforms.orthogonalize import FALLBACK_SCALE
from tests.tensors import normal
from tests.transforms.test_base import close, trained
from tests.transforms.test_orthogonalize import MLP, problem
from tests.transforms.test_precondition import layers_and_evaluate


@pytest.mark.parametrize("fallback", [None, lrkfac.trace(0.5)], ids=["Adam", "trace"])
def test_all_but_matrices_take_the_fallback_and_only_matrices_have_momentum(fallback):
    layers, params, evaluate = problem()
    tx = orthogonalize_by_fisher(layers, rank=2, fallback=fallback)
    rest = ["embedding", "loose", "scale", "shift"]
    fallback = fallback or lrkfac.chain(lrkfac.scale_by_adam(), lrkfac.scale(FALLBACK_SCALE))
    before = fallback.init([params[name] for name in rest])
    for e, updates, state, _ in trained(lrkfac.chain(tx, lrkfac.scale(-0.1)), params, evaluate):
        assert [tuple(m.shape) for m in state[0].momentum] == [(7,), (7, 6), (3, 7)]
        assert set(state[0].preconditioner.factors) == {"in", "out"}
        expected, before = fallback.update([e.grads[name] for name in rest], before)
        close([updates[name] for name in rest], [-0.1 * u for u in expected])
        joint = torch.cat([updates["in"], updates["bias"][:, None]], 1)
        for matrix in (joint, updates["out"]):
            close(matrix.square().mean().sqrt(), torch.tensor(0.1, dtype=torch.float64))


def test_a_weight_that_is_an_embedding_too_is_no_matrix():
    def model(p, x):
        return F.linear(torch.tanh(F.linear(F.embedding(x, p["embedding"]).mean(1), p["w"], p["b"])), p["embedding"])[
            :, :3
        ]

    layers, params, evaluate = problem(model, w=normal(6, 6), b=normal(6))
    (step,) = trained(orthogonalize_by_fisher(layers), params, evaluate, 1)
    assert set(step.state.preconditioner.factors) == {"w"}
    adam = FALLBACK_SCALE * step.evaluation.grads["embedding"].sign()
    close(step.updates["embedding"], adam, 1e-3, 1e-3)


def test_what_shares_a_parameter_with_an_embedding_is_no_matrix():
    """Nor what shares one with that: a parameter is stepped as a whole."""

    def model(p, x):
        rows, w, bias = p["both"][:9], p["both"][9:], p["shared"]
        y = torch.tanh(F.linear(F.embedding(x, rows).mean(1), w, bias[:6]))
        return F.linear(torch.tanh(F.linear(y, p["other"], bias[6:])), p["last"])

    both, shared = normal(15, 6), normal(13)
    layers, params, evaluate = problem(model, both=both, shared=shared, other=normal(7, 6), last=normal(3, 7))
    assert len(layers) == 4
    (step,) = trained(orthogonalize_by_fisher(layers), params, evaluate, 1)
    assert set(step.state.preconditioner.factors) == {"last"} and len(step.state.momentum) == 1
    for name in ("both", "shared", "other"):
        sign = FALLBACK_SCALE * step.evaluation.grads[name].sign()
        close(step.updates[name], sign, 1e-2, 1e-2)


def test_separate_biases_and_models_without_a_matrix():
    layers, evaluate = layers_and_evaluate(MLP, "empirical", bias="separate")
    (step,) = trained(orthogonalize_by_fisher(layers), MLP.params, evaluate, 1)
    assert len(step.state.momentum) == 3
    close(step.updates["0.bias"], FALLBACK_SCALE * step.evaluation.grads["0.bias"].sign(), 1e-3, 1e-3)
    x = torch.arange(4)
    only = lrkfac.find_layers(lambda p, x: F.embedding(x, p), torch.eye(4), x)
    evaluate = lrkfac.evaluator(lambda p, x: F.embedding(x, p), lrkfac.categorical(), only)
    for rank in (2, "auto"):
        (step,) = trained(orthogonalize_by_fisher(only, rank), torch.eye(4), lambda p, statistics: evaluate(p, x, x), 1)
        close(step.updates, FALLBACK_SCALE * step.evaluation.grads.sign(), 1e-3, 1e-3)
