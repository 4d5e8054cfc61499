"""What ``lrkfac`` offers: names and signatures; what importing it does not do. Docstrings: test_documentation.py."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lrkfac
import lrkfac.testing
from tests.public import NAMESPACES, public_names

PROMISED = """
    from_module find_layers Layers Layer LayerKind laplacian derivatives
    categorical gaussian bernoulli poisson joint Likelihood Weights
    evaluator Evaluation Statistics merge_evaluations LazyMatrix materialize unshard check_replicas
    GradientTransformation chain identity precondition_by_fisher scale_by_quadratic_model QuadraticModelOptions
    scale_by_slope_and_curvature
    precondition_in_sample_space orthogonalize_by_fisher spectral_kfac linalg.polar
    clip clip_by_kl clip_by_global_norm trace ema_params add_decayed_weights scale scale_by_learning_rate scale_by_adam
    masked partition apply_if_finite accumulate inject_hyperparams apply_updates round_robin_refresh factor_drift
    low_rank_kfac kfac adaptive_low_rank_kfac LowRankKFAC diagnose explain ranks_by_trace
    linalg.LowRankPlusDiagonal linalg.LowRankPlusIsotropic linalg.Dense linalg.Diagonal linalg.Kronecker
    linalg.inverse linalg.to_dense linalg.sherman_morrison linalg.woodbury
    linalg.power_iteration linalg.subspace_iteration
    curvature.from_state curvature.estimate curvature.LayerBlocks curvature.laplace curvature.Laplace
    curvature.influence
    linalg.damped linalg.scale linalg.logdet linalg.root linalg.inverse_root linalg.sample linalg.solve
    linalg.quadratic_form linalg.trace linalg.diagonal
    linalg.conjugate_gradient linalg.lanczos linalg.eigenvalues linalg.trace_estimate linalg.diagonal_estimate
    curvature.ggn curvature.fisher_product curvature.hessian curvature.spectral_density
    curvature.SpectralDensity curvature.ntk
    structures.kronecker structures.low_rank structures.low_rank_plus_diagonal structures.dense structures.diagonal
    structures.unit_wise structures.layer_wise structures.full
    schedules.constant_schedule schedules.exponential_decay schedules.piecewise_constant_schedule
    schedules.join_schedules schedules.warmup_cosine_decay_schedule
    checkpoint.save checkpoint.load checkpoint.state_dict checkpoint.from_state_dict
""".split()
PUBLIC = dict(public_names())


def test_promised_names_exist_and_nothing_else_is_public():
    """Whatever is in the package under a name without underscore is listed, or a module."""
    assert set(PROMISED) <= set(PUBLIC)
    others = {name for name, x in vars(lrkfac).items() if not name.startswith("_") and not inspect.ismodule(x)}
    assert others == set(lrkfac.__all__)
    for module in (lrkfac, *[getattr(lrkfac, space) for space in NAMESPACES]):
        assert module.__all__ == sorted(set(module.__all__))


def test_methods_and_checkers_are_documented():
    laws = ("inverse", "likelihood", "operator", "structure", "transformation")
    checkers = [getattr(lrkfac.testing, f"check_{law}") for law in laws]
    members = [(n, x) for thing in PUBLIC.values() for n, x in vars(thing).items() if inspect.isfunction(x)]
    methods = [x for n, x in members if not n.startswith("_")]
    assert [x.__qualname__ for x in (*methods, *checkers) if not inspect.getdoc(x)] == []


SIGNATURES = {
    "find_layers": "model params inputs strict=False",
    "evaluator": "model likelihood layers estimator='mc' samples=1 has_aux=False",
    "low_rank_kfac": "layers learning_rate rank=32 damping=0.03 decay=0.95 momentum=0.9 weight_decay=0.0 kl_clip=0.001",
    "kfac": "layers learning_rate damping=0.03 decay=0.95 momentum=0.9 weight_decay=0.0 kl_clip=0.001",
    "LowRankKFAC": "module likelihood inputs lr=None params=None",
    "precondition_by_fisher": "layers structure=None rank=None damping=0.03 decay=0.95 fallback=None",
    "precondition_in_sample_space": "layers damping=0.001 momentum=0.0 fallback=None dtype=None",
    "orthogonalize_by_fisher": "layers rank=16 power=0.25 momentum=0.95 decay=0.8 damping=0.001 fallback=None",
    "spectral_kfac": "layers learning_rate=None rank=16",
    "linalg.polar": "matrix iterations=6",
    "clip_by_kl": "kl_clip learning_rate",
    "scale_by_slope_and_curvature": "start=0.008",
    "trace": "decay nesterov=False",
    "ema_params": "decay=0.98 power=8.0",
    "scale_by_adam": "b1=0.9 b2=0.999 eps=1e-08",
    "linalg.LowRankPlusDiagonal": "vectors values diagonal",
    "linalg.LowRankPlusIsotropic": "vectors values rest",
    "linalg.inverse": "operator damping exact",
    "curvature.from_state": "state layers",
    "curvature.influence": "curvature queries examples damping exact=True",
    "curvature.laplace": "curvature params examples prior_precision=1.0",
    "curvature.estimate": "evaluate params batches layers structure=None rank=None passes=1",
    "curvature.ggn": "model likelihood has_aux=False chunk=8",
    "linalg.damped": "operator damping exact=True",
    "linalg.sample": "operator noise",
    "linalg.solve": "operator b",
    "linalg.quadratic_form": "operator x",
    "linalg.scale": "operator c",
    "curvature.ntk": "model layers=None chunk=32",
    "curvature.spectral_density": "operator samples=10 steps=30 generator=None noise=None like=None",
    "linalg.conjugate_gradient": "operator b preconditioner=None damping=0.0 tolerance=1e-06 max_iterations=1000",
    "linalg.lanczos": "operator start steps",
    "linalg.eigenvalues": "operator start rank=None which='magnitude'",
    "linalg.trace_estimate": "operator samples generator=None noise=None like=None method='xtrace'",
    "structures.kronecker": "input output",
    "apply_updates": "params updates",
}


@pytest.mark.parametrize(("name", "promised"), SIGNATURES.items(), ids=SIGNATURES)
def test_signatures_that_users_rely_on(name, promised):
    """The promised parameters come first, in this order and with these defaults."""
    first = [*inspect.signature(PUBLIC[name]).parameters.values()][: len(promised.split())]
    given = zip(first, promised.split(), strict=True)
    assert [p.name + f"={p.default!r}" * ("=" in expected) for p, expected in given] == promised.split()


def test_importing_the_package_does_not_import_what_only_tests_need():
    code = "import sys, lrkfac; print([m for m in sys.argv[1:] if m in sys.modules])"
    modules = ["hypothesis", "lrkfac.testing", "pytest", "safetensors", "matplotlib", "rich", "torch._dynamo"]
    folder = Path(lrkfac.__file__).parents[1]
    assert subprocess.check_output([sys.executable, "-c", code, *modules], cwd=folder, text=True) == "[]\n"
