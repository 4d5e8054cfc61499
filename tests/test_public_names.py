"""What ``lrkfac`` offers: its names, each documented; and what importing it does not do."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lrkfac
import lrkfac.testing
from tests.public import NAMESPACES, public_names

PROMISED = """
    from_module find_layers Layers Layer LayerKind
    categorical gaussian bernoulli poisson joint Likelihood Weights
    evaluator Evaluation Statistics merge_evaluations LazyMatrix materialize
    GradientTransformation chain identity precondition_by_fisher scale_by_quadratic_model
    clip clip_by_kl clip_by_global_norm trace ema_params add_decayed_weights scale scale_by_learning_rate scale_by_adam
    masked partition apply_if_finite accumulate inject_hyperparams apply_updates round_robin_refresh factor_drift
    low_rank_kfac kfac adaptive_low_rank_kfac LowRankKFAC diagnose explain ranks_by_trace
    linalg.LowRankPlusDiagonal linalg.Dense linalg.Diagonal linalg.Kronecker linalg.inverse linalg.to_dense
    linalg.power_iteration linalg.subspace_iteration linalg.sherman_morrison linalg.woodbury
    structures.kronecker structures.low_rank structures.low_rank_plus_diagonal structures.dense structures.diagonal
    structures.unit_wise structures.layer_wise structures.full
    schedules.constant_schedule schedules.exponential_decay schedules.piecewise_constant_schedule
    schedules.join_schedules schedules.warmup_cosine_decay_schedule
    checkpoint.save checkpoint.load checkpoint.state_dict checkpoint.from_state_dict
""".split()
CHECKERS = ["check_inverse", "check_likelihood", "check_structure", "check_transformation"]
PUBLIC = dict(public_names())
each_name = pytest.mark.parametrize("name", PUBLIC)


@pytest.mark.parametrize("module", [lrkfac, *[getattr(lrkfac, space) for space in NAMESPACES]])
def test_names_are_sorted_and_unique(module):
    assert module.__all__ == sorted(set(module.__all__))


def test_names_of_the_design_exist():
    assert set(PROMISED) <= set(PUBLIC)


def test_nothing_else_is_public():
    """Whatever is in the package under a name without underscore is listed, or a module."""
    others = {n for n, x in vars(lrkfac).items() if not n.startswith("_") and not inspect.ismodule(x)}
    assert others == set(lrkfac.__all__)


def described(thing):
    text = inspect.getdoc(thing) or ""
    automatic = f"{thing.__name__}("
    return len(text) > 10 and not text.startswith(automatic)


@each_name
def test_documented(name):
    assert described(PUBLIC[name]), f"{name} has no docstring of its own"


@each_name
def test_methods_are_documented(name):
    thing = PUBLIC[name]
    methods = {n: m for n, m in vars(thing).items() if not n.startswith("_") and inspect.isfunction(m)}
    assert [n for n, m in methods.items() if not inspect.getdoc(m)] == []


@pytest.mark.parametrize("name", CHECKERS)
def test_checkers_are_documented(name):
    assert described(getattr(lrkfac.testing, name))


def test_package_is_typed_and_versioned():
    assert Path(lrkfac.__file__).with_name("py.typed").exists()
    assert lrkfac.__version__.count(".") == 2


SIGNATURES = {
    "find_layers": "model params inputs strict=False",
    "evaluator": "model likelihood layers estimator='mc' samples=1 has_aux=False",
    "low_rank_kfac": "layers learning_rate rank=32 damping=0.01 decay=0.95 momentum=0.9 weight_decay=0.0 kl_clip=0.001",
    "kfac": "layers learning_rate damping=0.01 decay=0.95 momentum=0.9 weight_decay=0.0 kl_clip=0.001",
    "precondition_by_fisher": "layers structure=None rank=None damping=0.01 decay=0.95 fallback=None",
    "clip_by_kl": "kl_clip learning_rate",
    "trace": "decay nesterov=False",
    "scale_by_adam": "b1=0.9 b2=0.999 eps=1e-08",
    "linalg.LowRankPlusDiagonal": "vectors values diagonal",
    "linalg.inverse": "operator damping",
    "structures.kronecker": "input output",
    "apply_updates": "params updates",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_that_users_rely_on(name):
    """The promised parameters come first, in this order and with these defaults."""
    found = inspect.signature(PUBLIC[name]).parameters.values()
    promised = SIGNATURES[name].split()
    for parameter, expected in zip(found, promised, strict=False):
        default = "" if "=" not in expected else f"={parameter.default!r}"
        assert f"{parameter.name}{default}" == expected
    assert len(found) >= len(promised)


def test_importing_the_package_does_not_import_what_only_tests_need():
    code = "import sys, lrkfac; print([m for m in sys.argv[1:] if m in sys.modules])"
    modules = ["hypothesis", "lrkfac.testing", "pytest", "safetensors", "matplotlib", "rich", "torch._dynamo"]
    done = subprocess.run(
        [sys.executable, "-c", code, *modules],
        cwd=Path(lrkfac.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
