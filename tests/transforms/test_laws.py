"""Every transformation is pure, keeps the form of its state, and under ``vmap`` does the same as alone."""

from functools import partial

import optree
import pytest
import torch

import lrkfac
from lrkfac import chain, masked, scale_by_adam
from lrkfac.schedules import exponential_decay
from lrkfac.structures import dense, diagonal, kronecker, low_rank, low_rank_plus_diagonal
from lrkfac.testing import check_transformation
from tests import cases
from tests.compiling import traced
from tests.transforms.test_base import SEVERAL, close, nested
from tests.transforms.test_hyperparameters import MAKE, RATES, TREES
from tests.transforms.test_masking import INNER, MASKS, kfac_and_adam
from tests.transforms.test_precondition import STRUCTURES, layers_and_evaluate
from tests.transforms.test_travel import ELEMENTWISE, EVALUATE, TRANSFORMATIONS

MLP, SHIFT, GROUPS = cases.LINEAR[0], cases.LINEAR[6], cases.CONVOLUTION[3]
EQUAL = cases.make_case("equal", cases.with_tanh(*[cases.linear(4, 4)] * 3), (5, 4))
INJECTED = {"value": (lrkfac.clip, {"max_delta": 0.3}), "average": (lrkfac.ema_params, {"decay": 0.8, "power": 2.0})}
OF_ANY_TREE = {
    **ELEMENTWISE,
    "nested chains": chain(SEVERAL[0], chain(*SEVERAL[1:])),
    "empty chain": chain(),
    **{name: lrkfac.inject_hyperparams(make)(**options) for name, (make, options) in INJECTED.items()},
    **{f"masked, {name}": masked(INNER, mask) for name, (mask, _) in MASKS.items()},
    **{f"{name}, a tree": make(TREES["ends earlier"][0]) for name, make in MAKE.items()},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OF_ANY_TREE)
def test_of_any_tree(name, dtype):
    grads = nested(dtype, seed=1)
    e = lrkfac.Evaluation(*[None] * len(lrkfac.Evaluation._fields))._replace(grads=grads)
    extra = {"evaluation": e} if name.startswith("clip_by_kl") else {}
    check_transformation(OF_ANY_TREE[name], nested(dtype), lambda p: (grads, extra))


def finite(layers):
    return lrkfac.apply_if_finite(lrkfac.low_rank_kfac(layers, 0.1, rank=2), 5)


def precondition(layers, **options):
    return lrkfac.precondition_by_fisher(layers, **options)


DAMPED_OR_CORRECTED = {
    "exactly damped": kronecker(low_rank(2), low_rank_plus_diagonal(1), exact_damping=True),
    "exactly damped, dense": kronecker(low_rank(1), dense(), exact_damping=True),
    "corrected": kronecker(low_rank(2), low_rank_plus_diagonal(1), corrected=True),
    "corrected, reduce": kronecker(diagonal(), low_rank(2), "reduce", corrected=True),
}
# Elementwise, those that look at evaluations; "adaptive, bounded" makes steps so short that rounding exceeds a share,
# and so does rounding that a polar factor raises: its ensembles are in tests/test_training_step.py.
ELSEWHERE = {*ELEMENTWISE, "adaptive, bounded", "spectral_kfac", "spectral, without a rate"} - {
    "accumulate",
    "clip_by_kl",
    "masked",
}
OF_MODELS = {
    **{name: (MLP, lambda _, tx=tx: tx) for name, tx in TRANSFORMATIONS.items() if name not in ELSEWHERE},
    **{
        f"{name}, groups": (GROUPS, partial(precondition, structure=s))
        for name, s in (STRUCTURES | DAMPED_OR_CORRECTED).items()
    },
    "layers of equal form": (EQUAL, partial(precondition, rank=1)),
    "spectral, groups": (GROUPS, partial(lrkfac.orthogonalize_by_fisher, rank=2)),
    "spectral, layers of equal form": (EQUAL, partial(lrkfac.orthogonalize_by_fisher, rank=1)),
    "spectral, fallback": (SHIFT, partial(lrkfac.orthogonalize_by_fisher, rank=2, iterations=2)),
    "finite": (GROUPS, finite),
    "not finite": (GROUPS, finite),
    "fallback": (SHIFT, partial(precondition, rank=1, fallback=scale_by_adam())),
    "partition of layers": (SHIFT, kfac_and_adam),
}


@pytest.mark.parametrize("name", OF_MODELS)
def test_with_evaluations(name):
    """Also of groups, uncovered parameters and statistics that are not finite."""
    case, make = OF_MODELS[name]
    layers, evaluate = layers_and_evaluate(case, "mc")
    noise = torch.rand_like(case.model(case.params, case.inputs)[None])
    options = {"statistics": False} if name == "accumulate" else {"noise": noise}

    def evaluated(params):
        e = evaluate(params, **options)
        if name == "not finite":
            e = e._replace(statistics=optree.tree_map(lambda x: x * float("nan"), e.statistics))
        return e.grads, {"evaluation": e}

    check_transformation(make(layers), case.params, evaluated, steps=3 if name == "accumulate" else 2)


COMPILED = {
    "rates": lrkfac.scale_by_learning_rate({**RATES, "0.weight": exponential_decay(0.3, 1, 0.5)}),
    "apply_if_finite": lrkfac.apply_if_finite(TRANSFORMATIONS["low_rank_kfac"], 2),
    "corrected": TRANSFORMATIONS["dense, corrected"],
    "exactly damped": TRANSFORMATIONS["exactly damped"],
    **{
        name: tx
        for name, tx in TRANSFORMATIONS.items()
        if name in ("accumulate", "partition", "slope and curvature") or "adaptive" in name or "spectral" in name
    },
}


# Those of which a step without statistics is more than a part of one with them; it is all that one takes.
WITHOUT = [name for name in COMPILED if name not in ("rates", "corrected", "exactly damped")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, statistics",
    [*[(name, True) for name in COMPILED if name != "accumulate"], *[(name, False) for name in WITHOUT]],
)
def test_compiled_equals_eager(name, statistics):
    torch.compiler.reset()
    tx, params = COMPILED[name], MLP.params

    def step(params, state, e):
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        return lrkfac.apply_updates(params, updates), state

    params, state = step(params, tx.init(params), EVALUATE(params, statistics=statistics))
    e = EVALUATE(params, statistics=statistics)
    close(traced(step)(params, state, e), step(params, state, e), rtol=1e-8, atol=1e-10)
