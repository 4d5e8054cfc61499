"""A valid call of each transformation, schedule and optimizer, and for each of its arguments what it may not be."""

import inspect
from typing import Any

import torch
from hypothesis import strategies as st

import lrkfac
from lrkfac import GradientTransformation, Likelihood
from tests.bad_values import (
    DTYPE,
    EVALUATION,
    FLAG,
    FUNCTION,
    NAN,
    NOTHING,
    TRANSFORMATION,
    among,
    integer,
    number,
    tree,
)
from tests.public import BY_SHORT_NAME
from tests.public_calls import LAYERS, NOT_GROUPS, NOT_LAYERS, NOT_TREES, OF_COLUMNS, WITHOUT, E, G, P, public, valid

# Tables, of few lines each entry.
# fmt: off
PRECONDITION = lrkfac.precondition_by_fisher(LAYERS, rank=1)
RATE, POSITIVE = number(0, schedule=True, trees=True), number(0, includes_low=False)
SHARE, NONNEGATIVE = number(0, 1), number(0)
SHARES, DECAYS = number(0, 1, trees=True), number(0, trees=True)
SHARE_OR_NONE = number(0, 1, optional=True)
NOT_OPTIONS = among(1, "x", {"max_steps": 3}, lrkfac.QuadraticModelOptions, *NOTHING)
KL_CLIP = number(0, includes_low=False, optional=True)
STRUCTURE = among(1, "x", torch.ones(2), lrkfac.structures.dense(), {"x": lrkfac.structures.dense()},
    {"*": lrkfac.structures.dense()}, {"*": 1}, {"none": None}, lambda layer: 1, lambda layer: lrkfac.structures.full(),
    1j, object(), [], ())
NOT_RANKS = among("automatic", {"none": 1}, {"*": 0}, {"*": 1.5})
RANK = st.one_of(integer(optional=True).filter(lambda x: x != {}), NOT_RANKS)
RANK_OF_CHAIN = st.one_of(RANK, st.none())
OF_DTYPE = {"dtype": DTYPE.filter(lambda x: x is not None)}

# Transformations and schedules.
SCHEDULE = lrkfac.schedules.constant_schedule(0.1)
public("identity")
public("scale", {"factor": 0.1}, factor=number())
public("scale_by_learning_rate", {"learning_rate": 0.1}, learning_rate=RATE)
public("scale_by_adam", b1=SHARE, b2=SHARE, eps=NONNEGATIVE)
public("trace", {"decay": 0.9}, decay=SHARES, nesterov=FLAG)
public("ema_params", decay=SHARE, power=NONNEGATIVE)
public("add_decayed_weights", {"weight_decay": 0.1}, weight_decay=DECAYS)
public("clip", {"max_delta": 1.0}, max_delta=POSITIVE)
public("clip_by_global_norm", {"max_norm": 1.0}, max_norm=POSITIVE)
public("clip_by_kl", {"kl_clip": 1.0, "learning_rate": 0.1}, kl_clip=POSITIVE, learning_rate=RATE)
public("masked", {"inner": lrkfac.trace(0.9), "mask": True}, inner=TRANSFORMATION, mask=st.nothing())
public("partition", {"transformations": {"a": lrkfac.trace(0.9)}, "labels": "a"}, labels=st.nothing(),
    transformations=among(1, "x", lrkfac.trace(0.9), {"a": lrkfac.trace}, [lrkfac.trace(0.9)],
        *[x for x in NOTHING if x != {}]))
public("apply_if_finite", {"inner": lrkfac.trace(0.9), "max_consecutive_errors": 3}, inner=TRANSFORMATION,
    max_consecutive_errors=integer())
public("accumulate", {"inner": lrkfac.trace(0.9), "every": 3}, inner=TRANSFORMATION, every=integer())
public("merge_evaluations", {"evaluations": [E, E]},
    evaluations=among(1, "x", E, [E, "x"], [E, WITHOUT], [E, E.grads], (None,), [tuple(E)],
        *[x for x in NOTHING if not callable(x)]), group=NOT_GROUPS)
public("inject_hyperparams", {"factory": lrkfac.trace}, factory=st.one_of(FUNCTION, st.just(lrkfac.trace(0.9))))
public("constant_schedule", {"value": 0.1}, value=number())
public("warmup_cosine_decay_schedule", {"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 2, "decay_steps": 9},
    init_value=number(), peak_value=number(), warmup_steps=number(0, 9), decay_steps=number(2, includes_low=False),
    end_value=number())
public("exponential_decay", {"init_value": 1.0, "transition_steps": 1, "decay_rate": 0.5}, init_value=number(),
    transition_steps=number(1), decay_rate=POSITIVE, transition_begin=NONNEGATIVE, staircase=FLAG,
    end_value=number(optional=True))
public("piecewise_constant_schedule", {"init_value": 1.0, "boundaries_and_scales": {5: 0.1}}, init_value=number(),
    boundaries_and_scales=among(1, "x", {-1: 0.1}, {1: NAN}, {1: "x"}, {"x": 1}, {NAN: 1.0}, {1: None},
        *[x for x in NOTHING if not isinstance(x, dict)]))
public("join_schedules", {"schedules": [SCHEDULE, SCHEDULE], "boundaries": [5]},
    schedules=among(1, "x", [SCHEDULE], [SCHEDULE, 0.1], (SCHEDULE, SCHEDULE, SCHEDULE), *NOTHING),
    boundaries=among(1, "x", [0], [-1], [NAN], ["x"], [None], [5, 6], [1j],
        *[x for x in NOTHING if x not in ([1.0], b"x")]))
public("precondition_by_fisher", {"layers": LAYERS}, layers=NOT_LAYERS, structure=STRUCTURE, rank=RANK,
    damping=POSITIVE, decay=SHARE, fallback=TRANSFORMATION.filter(lambda x: x is not None), differentiable=FLAG,
    balanced=FLAG, owners=NOT_GROUPS, **OF_DTYPE)
public("precondition_in_sample_space", {"layers": LAYERS}, layers=NOT_LAYERS, damping=POSITIVE, momentum=SHARE,
    fallback=TRANSFORMATION.filter(lambda x: x is not None), **OF_DTYPE)
public("scale_by_quadratic_model", {"preconditioner": PRECONDITION}, preconditioner=TRANSFORMATION, damping=POSITIVE,
    weight_decay=DECAYS, kl_clip=KL_CLIP, gradient_decay=SHARE_OR_NONE, options=NOT_OPTIONS)
public("QuadraticModelOptions", damping_decay=number(0, 1, includes_low=False), max_steps=integer(),
    damping_interval=integer(), start_steps=NONNEGATIVE, start_decay=SHARE, damping_share=SHARE,
    min_damping=POSITIVE,
    max_damping=number(1e-10, includes_low=False), lower_threshold=number(),
    upper_threshold=number(0.25, includes_low=False), reject=FLAG, rejection_factor=number(1, includes_low=False))
public("scale_by_slope_and_curvature", {}, start=POSITIVE)
valid("chain", lambda transformations: lrkfac.chain(*transformations), {"transformations": [lrkfac.trace(0.9)]},
    transformations=st.lists(TRANSFORMATION, min_size=1, max_size=3))
KFAC = {"learning_rate": RATE, "damping": POSITIVE, "decay": SHARE, "momentum": SHARES, "weight_decay": DECAYS}
OF_STATISTICS = {**OF_DTYPE, "differentiable": FLAG, "owners": NOT_GROUPS}
public("kfac", {"layers": LAYERS, "learning_rate": 0.1}, layers=NOT_LAYERS, **KFAC, kl_clip=POSITIVE, **OF_STATISTICS)
public("low_rank_kfac", {"layers": LAYERS, "learning_rate": 0.1}, layers=NOT_LAYERS, rank=RANK_OF_CHAIN, **KFAC,
    kl_clip=POSITIVE, **OF_STATISTICS)
public("adaptive_low_rank_kfac", {"layers": LAYERS}, layers=NOT_LAYERS, rank=RANK_OF_CHAIN, damping=POSITIVE,
    decay=SHARE, weight_decay=DECAYS, **OF_DTYPE, kl_clip=KL_CLIP, gradient_decay=SHARE_OR_NONE,
    owners=NOT_GROUPS, options=NOT_OPTIONS, dense_up_to=integer(0, optional=True))
POWER = st.one_of(number(0, tensor=False), st.just(1.5))
SPECTRAL = {"rank": RANK_OF_CHAIN, "power": POWER, "momentum": SHARE, "decay": SHARE, "damping": POSITIVE,
    "fallback": TRANSFORMATION.filter(lambda x: x is not None), **OF_DTYPE}
public("orthogonalize_by_fisher", {"layers": LAYERS}, layers=NOT_LAYERS, **SPECTRAL, normalized=FLAG,
    iterations=integer(optional=True))
public("spectral_kfac", {"layers": LAYERS, "learning_rate": 0.1}, layers=NOT_LAYERS,
    learning_rate=RATE.filter(lambda x: x is not None), **SPECTRAL, weight_decay=DECAYS)
valid("inject_hyperparams()", lrkfac.inject_hyperparams(lrkfac.scale_by_learning_rate), {"learning_rate": 0.1},
    learning_rate=RATE)
valid("masked().init", lambda mask: lrkfac.masked(lrkfac.trace(0.9), mask).init(P), {"mask": True},
    mask=among(1, "x", None, {"0.bias": True}, dict.fromkeys(P, 1), dict.fromkeys(P), [True], torch.tensor(True)))
valid("partition().init", lambda labels: lrkfac.partition({"a": lrkfac.trace(0.9)}, labels).init(P), {"labels": "a"},
    labels=among(1, "x", None, {"0.bias": "a"}, dict.fromkeys(P, "b"), dict.fromkeys(P), ["a"], 1j))

# What transformations do.
MASK = lambda tree: dict.fromkeys(tree, True) if isinstance(tree, dict) else True  # noqa: E731
LABELS = lambda tree: dict.fromkeys(tree, "a") if isinstance(tree, dict) else "a"  # noqa: E731
STATELESS = {"identity": lrkfac.identity(), "scale": lrkfac.scale(0.1),
    "scale_by_learning_rate": lrkfac.scale_by_learning_rate(0.1), "clip": lrkfac.clip(1.0),
    "clip_by_global_norm": lrkfac.clip_by_global_norm(1.0), "add_decayed_weights": lrkfac.add_decayed_weights(0.1)}
STATEFUL = {"scale_by_learning_rate(schedule)": lrkfac.scale_by_learning_rate(SCHEDULE), "trace": lrkfac.trace(0.9),
    "scale_by_adam": lrkfac.scale_by_adam(), "ema_params": lrkfac.ema_params(),
    "clip_by_kl": lrkfac.clip_by_kl(1.0, 0.1),
    "masked": lrkfac.masked(lrkfac.trace(0.9), MASK), "partition": lrkfac.partition({"a": lrkfac.trace(0.9)}, LABELS),
    "apply_if_finite": lrkfac.apply_if_finite(lrkfac.trace(0.9), 3),
    "accumulate": lrkfac.accumulate(lrkfac.trace(0.9), 3),
    "inject_hyperparams": lrkfac.inject_hyperparams(lrkfac.trace)(decay=0.9),
    "chain": lrkfac.chain(lrkfac.trace(0.9), lrkfac.scale(0.1)), "precondition_by_fisher": PRECONDITION,
    "scale_by_quadratic_model": lrkfac.scale_by_quadratic_model(PRECONDITION),
    "precondition_in_sample_space": lrkfac.precondition_in_sample_space(LAYERS, momentum=0.5),
    "orthogonalize_by_fisher": lrkfac.orthogonalize_by_fisher(LAYERS, rank=1),
    "spectral_kfac": lrkfac.spectral_kfac(LAYERS, 0.1, rank=1, weight_decay=0.1),
    "spectral_kfac(None)": lrkfac.spectral_kfac(LAYERS, rank=1, weight_decay=0.1),
    "scale_by_slope_and_curvature": lrkfac.scale_by_slope_and_curvature(),
    "kfac": lrkfac.kfac(LAYERS, 0.1, weight_decay=0.1),
    "low_rank_kfac": lrkfac.low_rank_kfac(LAYERS, 0.1, rank=1, weight_decay=0.1),
    "adaptive_low_rank_kfac": lrkfac.adaptive_low_rank_kfac(LAYERS, rank=1)}
# fmt: on
OF_LAYERS = {
    "precondition_by_fisher",
    "precondition_in_sample_space",
    "orthogonalize_by_fisher",
    "scale_by_quadratic_model",
    "kfac",
    "low_rank_kfac",
    "adaptive_low_rank_kfac",
    "spectral_kfac",
    "spectral_kfac(None)",
}
NEED_EVALUATION = OF_LAYERS | {"clip_by_kl", "scale_by_slope_and_curvature"}
TAKE_EVALUATION = {"apply_if_finite", "accumulate", "masked", "partition"}
NEED_PARAMS = OF_LAYERS - {"precondition_by_fisher", "precondition_in_sample_space", "orthogonalize_by_fisher"} | {
    "add_decayed_weights",
    "ema_params",
    "scale_by_slope_and_curvature",
}
OTHERS_STATE = PRECONDITION.init(P), lrkfac.chain(lrkfac.trace(0.9)).init(P), lrkfac.scale_by_adam().init(P)
for name, tx in {**STATELESS, **STATEFUL}.items():
    state, evaluation = tx.init(P), OF_COLUMNS if name == "precondition_in_sample_space" else E
    evaluation = E._replace(statistics=None) if name == "accumulate" else evaluation
    shaped = (name not in STATELESS and name != "scale_by_learning_rate(schedule)") or name == "add_decayed_weights"
    others = [x for x in (1, "x", *NOTHING, *OTHERS_STATE) if type(x) is not type(state) or (x and type(x) is tuple)]
    bad = {"updates": tree(G, shapes=shaped), "state": among(*others)}
    if name in NEED_PARAMS:
        bad["params"] = NOT_TREES
    if name in NEED_EVALUATION | TAKE_EVALUATION:
        bad["evaluation"] = EVALUATION if name in NEED_EVALUATION else EVALUATION.filter(lambda x: x is not None)
    valid(f"{name}().init", tx.init, {"params": P}, params=tree(P, shapes=name in OF_LAYERS))
    valid(f"{name}().update", tx.update, {"updates": G, "state": state, "params": P, "evaluation": evaluation}, **bad)


def base(name: str) -> Any:
    """What is public of an entry such as ``trace().update``."""
    return BY_SHORT_NAME[name.split("(")[0].split(".")[0]]


def documentation(name: str) -> str:
    """What the entry says about errors."""
    found = base(name)
    own = getattr(found, name.split(".")[-1], None) if "." in name and "(" not in name else None
    protocol = [GradientTransformation, lrkfac.from_module, lrkfac.find_layers, lrkfac.evaluator, Likelihood.loss]
    texts = [inspect.getdoc(x) or "" for x in (found, own) if x is not None]
    if ".init" in name or ".update" in name:
        texts.append(inspect.getdoc(protocol[0]) or "")
    if name.startswith(("LowRankKFAC", "evaluator", "Evaluation")):
        texts += [inspect.getdoc(x) or "" for x in protocol[1:]]
    if name in ("kfac", "adaptive_low_rank_kfac", "low_rank_kfac", "spectral_kfac"):
        texts.append(inspect.getdoc(lrkfac.precondition_by_fisher) or "")
    return "\n".join(texts)
