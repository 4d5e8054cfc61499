"""A valid call of all that is public but transformations, and for each of its arguments what it may not be.

Whoever adds a public name adds it here: ``tests/test_public_calls.py`` refuses a name or an argument without an entry.
"""

import atexit
import inspect
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import nn

import lrkfac
from lrkfac.core.base.processes import Processes
from tests import bad_values as values
from tests.bad_values import EYE, FLAG, FUNCTION, INF, NAN, NOTHING, among, integer, number, one_of, tree
from tests.public import BY_SHORT_NAME


class Call(NamedTuple):
    """``function(**arguments)`` is valid; it is refused with any of the values of ``bad`` instead of its argument."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    bad: dict[str, st.SearchStrategy[Any]]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


NET, X, Y = network(), torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 0])
MODEL, PARAMS = lrkfac.from_module(NET)
P = {name: x.clone() for name, x in PARAMS.items()}
LAYERS = lrkfac.find_layers(MODEL, P, X)
EVALUATE, EXACT = (lrkfac.evaluator(MODEL, lrkfac.categorical(), LAYERS, estimator) for estimator in ("mc", "exact"))
E = EVALUATE(P, X, Y)
WITHOUT = EVALUATE(P, X, Y, statistics=False)
OF_COLUMNS = EXACT(P, X, Y)
G = E.grads
FOLDER = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
SAVED = FOLDER / "saved"
FLAT = {"w": torch.ones(2, 3), "step": 3}
# Tables, of few lines each entry.
# fmt: off
NOT_LAYERS = among(1, "x", NET, LAYERS.layers, [*LAYERS], lrkfac.find_layers, *NOTHING)
NOT_INPUTS = among(X.to("meta"), X[:0], (X.to("meta"),), {"x": X.to("meta")})
NOT_TARGETS = among(1, "x", None, Y.tolist(), Y.double(), Y.bool(), Y + 10, Y - 1, Y[:5], Y[:, None], Y[0],
    Y.to("meta"), torch.eye(2)[Y], (Y,), {"y": Y})
NOT_STATISTICS = among(1, 0, "x", None, 0.5, torch.tensor(True), ("0",), torch.tensor([0]))
NOT_NAMES = among(1, True, "0", ["0"], ("x",), (1,), torch.tensor([0]), {"0": 1})
NOT_EXAMPLES = among(1, True, "x", 0.5, [0], torch.tensor(True), torch.tensor(0), torch.ones(2), torch.tensor([6]),
    torch.tensor([-1]), torch.tensor([0]).int(), Y[:0], Y[:, None], ("0",))
NOT_NOISE = among(1, "x", [0.5], torch.rand(6, 2), torch.rand(2, 6, 2), torch.zeros(1, 6, 2).long(),
    torch.rand(1, 6, 2) + 1, torch.rand(1, 6, 2) - 1, torch.full((1, 6, 2), NAN), torch.rand(1, 6, 2, device="meta"),
    (torch.rand(1, 6, 2),))
NOT_TREES = st.one_of(tree(P), st.just(lrkfac.checkpoint.state_dict(P) | {"0.bias": torch.ones(5)}))
NOT_LEAVES = among(1j, object(), b"x", {"w": 1j}, (torch.ones(2), object()), [nn.Linear(1, 1)], {"a": {"b": b"x"}})
NOT_GROUPS = among(1, "x", True, 1j, object(), [0], {}, (torch.ones(2),))
VALID: dict[str, Call] = {}
# fmt: on


def valid(name: str, function: Callable[..., Any], arguments: dict[str, Any], /, **bad: st.SearchStrategy[Any]) -> None:
    VALID[name] = Call(function, arguments, bad)


def public(name: str, arguments: dict[str, Any] | None = None, /, **bad: st.SearchStrategy[Any]) -> None:
    valid(name, BY_SHORT_NAME[name], arguments or {}, **bad)


def container(name: str) -> None:
    """Built by trees with leaves of any kind: what it is given is looked at where it is used."""
    fields = inspect.signature(BY_SHORT_NAME[name]).parameters.values()
    public(name, {field.name: None for field in fields if field.default is field.empty})


# fmt: off
for name in ("Dense", "Diagonal", "Kronecker", "LowRankPlusDiagonal", "LowRankPlusIsotropic", "FactorStructure",
        "Evaluation", "Statistics", "Weights", "LazyMatrix", "Layer", "Layers", "GradientTransformation"):
    container(name)
public("Likelihood", {"name": "x", "negative_log_likelihood": torch.sub, "sample": torch.add, "square_root": torch.mul},
    name=among(1, *NOTHING), event_axes=among(1, "x", (0,), (1.5,), [1], (True,), 1j, object()),
    **{name: FUNCTION for name in ("negative_log_likelihood", "sample", "square_root")},
    **{name: FUNCTION.filter(lambda x: x is not None)
       for name in ("check", "product", "weights", "weighted_loss", "residual")})

# Models, likelihoods, curvature.
public("from_module", {"module": NET},
    module=among(1, "x", nn.Linear, nn.Identity(), nn.Dropout(0.5),
        *[x for x in NOTHING if not isinstance(x, nn.Module)]), buffers=FLAG,
    output=among(1.5, True, (), [0], {}, 1j, object()))
public("find_layers", {"model": MODEL, "params": P, "inputs": X}, model=FUNCTION, params=tree(P, shapes=False),
    inputs=among(X.to("meta"), (X.to("meta"),)), strict=FLAG, bias=one_of("joint", "separate"),
    uncovered=one_of("plain", "jacobian"),
    kinds=among(1, "x", [1], [torch.sub], lrkfac.LayerKind, *[x for x in NOTHING if x not in ([], ())]),
    batch_axes=among(2, "x", True, 0.5, [0], (0, 1), {"x": 0}, object()))
NOT_POINTS = among(1, "x", None, X.long(), X.to("meta"), X[0, 0], X[:, :0], (X,), X.tolist())
public("laplacian", {"network": MODEL}, network=FUNCTION)
public("derivatives", {"network": MODEL}, network=FUNCTION,
    second=among(1, "x", None, {}, [1], [(0,)], [(0, -1)], [(0, 1.0)], [(0, True)], [()], [((0, 0), 1)], object()))
valid("laplacian()", lrkfac.laplacian(MODEL), {"params": P, "points": X}, points=NOT_POINTS)
valid("derivatives()", lrkfac.derivatives(MODEL, [(0, 2)]), {"params": P, "points": X}, points=NOT_POINTS)
public("LayerKind", {"name": "x", "function": torch.sub, "operation": torch.add}, name=among(1, *NOTHING),
    **{name: FUNCTION for name in ("function", "operation", "parts")},
    weight_axis=among("0", 1.0, True, torch.tensor(1), *[x for x in NOTHING if x is not None]),
    channel=among(0, 1, "-1", -1.0, True, torch.tensor(-1), *NOTHING))
public("evaluator", {"model": MODEL, "likelihood": lrkfac.categorical(), "layers": LAYERS}, model=FUNCTION,
    likelihood=values.LIKELIHOOD, layers=NOT_LAYERS, estimator=one_of("mc", "exact", "empirical", "forward_only"),
    samples=integer(), has_aux=FLAG, thin=FLAG, differentiable=FLAG, group=NOT_GROUPS,
    scatter=among(1, "x", True, 1j, None))
valid("evaluator()", EVALUATE, {"params": P, "inputs": X, "targets": Y}, params=NOT_TREES, inputs=NOT_INPUTS,
    targets=NOT_TARGETS, statistics=NOT_STATISTICS, layers=NOT_NAMES, examples=NOT_EXAMPLES, noise=NOT_NOISE)
valid("evaluator(exact)()", EXACT, {"params": P, "inputs": X, "targets": Y},
    noise=st.one_of(NOT_NOISE, st.just(torch.rand(1, 6, 2))))
valid("Evaluation.product", E.product, {"tangent": P}, tangent=NOT_TREES)
valid("Evaluation.quadratic", E.quadratic, {"u": P, "v": P}, u=NOT_TREES, v=NOT_TREES)
valid("Evaluation.gram", E.gram, {"tangents": {k: x[None] for k, x in P.items()}}, tangents=NOT_TREES.filter(
    lambda tree: not isinstance(tree, dict) or "0.weight" not in tree or getattr(tree["0.weight"], "ndim", 0) != 3))
valid("Evaluation.loss_at", E.loss_at, {"params": P}, params=NOT_TREES)
public("categorical", axis=among(0, "1", 1.0, True, torch.tensor(1), *NOTHING),
    ignore_index=among("1", 1.0, True, torch.tensor(1), *[x for x in NOTHING if x is not None]),
    class_weights=among(1, "x", 1j, object(), [], (), {}, [NAN, 1.0], [-1.0], [0.0, 0.0], [[1.0]], torch.tensor([1j]),
        ["a"], [1.0, INF], torch.ones(2, 2), torch.ones(2).bool(), torch.ones(2, device="meta"), torch.tensor(1.0)),
    label_smoothing=number(0, 1, tensor=False))
public("gaussian",
    variance=among(0, -1.0, NAN, INF, "1", True, None, *NOTHING, torch.tensor([1.0, 0.0]), torch.tensor(-1.0),
        torch.tensor(1j), torch.tensor(True), torch.tensor(NAN), torch.ones(2, device="meta")))
public("bernoulli")
public("poisson")
public("joint", {"likelihoods": {"a": lrkfac.gaussian(), "b": lrkfac.poisson()}, "weights": {"a": 1.0, "b": 2.0}},
    likelihoods=among(1, "x", [lrkfac.gaussian], {"a": 1}, torch.ones(2), *NOTHING),
    weights=among(1, "x", {"a": 1.0}, [1.0, 2.0],
        *[{"a": 1.0, "b": b} for b in (-1.0, NAN, INF, "2", True, torch.ones(()))]))
for name, y in {"bernoulli": torch.rand(6, 2), "poisson": torch.ones(6, 2), "gaussian": torch.ones(6, 2)}.items():
    outside = {"bernoulli": [y + 2, y - 2, y.long()], "poisson": [-y, y - 1.5, y.bool(), -y.long()],
        "gaussian": [y.long()]}
    shapes = [y[:5], y[:, :1], y.mT, y[0], y.to("meta"), y.to(torch.complex64), y.tolist(), None, "x", (y,)]
    valid(f"evaluator({name})()", lrkfac.evaluator(MODEL, getattr(lrkfac, name)(), LAYERS),
        {"params": P, "inputs": X, "targets": y}, targets=among(*outside[name], *shapes))

# Linear algebra.
public("kronecker", {"input": lrkfac.structures.dense(), "output": lrkfac.structures.dense()}, input=values.FACTOR,
    output=values.FACTOR, treatment=one_of("expand", "reduce"), corrected=FLAG, exact_damping=FLAG)
LOW = {"rank": integer(), "iterations": integer(), "method": one_of("subspace", "power"),
    "weight": number(0, tensor=False), "dense_up_to": integer(0, optional=True)}
public("low_rank", {"rank": 2}, **LOW, residual=one_of("isotropic", "none"))
public("low_rank_plus_diagonal", {"rank": 2}, **LOW, fit=one_of("alternating", "off_diagonal"))
for name in ("dense", "diagonal", "unit_wise", "layer_wise", "full"):
    public(name)
LOW_RANK_OPERATOR = lrkfac.linalg.LowRankPlusDiagonal(EYE, torch.ones(2), torch.ones(2))
public("to_dense", {"operator": LOW_RANK_OPERATOR}, operator=values.OPERATOR)
public("inverse", {"operator": lrkfac.linalg.Dense(EYE)}, operator=values.OPERATOR, damping=number(0),
    exact=FLAG)
ONE = {"operator": LOW_RANK_OPERATOR}
for name in ("root", "inverse_root", "logdet", "trace of linalg", "diagonal of linalg"):
    public(name, ONE, operator=values.OPERATOR)
public("damped", {**ONE, "damping": 0.1}, operator=values.OPERATOR, damping=number(0), exact=FLAG)
public("scale of linalg", {**ONE, "c": 2.0}, operator=values.OPERATOR, c=number())
NOT_VECTORS = among(1, "x", 1.0, values.COUNTS, torch.ones(3), torch.ones(()), torch.ones(2, 2, 2),
    torch.ones(2).double(), torch.ones(3, 2), torch.ones(2, device="meta"), torch.ones(2) * 1j, *NOTHING)
for name, argument in {"sample": "noise", "solve": "b", "quadratic_form": "x"}.items():
    public(name, {**ONE, argument: torch.ones(2)}, operator=values.OPERATOR, **{argument: NOT_VECTORS})
public("polar", {"matrix": torch.eye(2)}, iterations=values.integer(optional=True),
    matrix=among(1, "x", torch.ones(2), torch.eye(2).long(), torch.eye(2) * 1j, *NOTHING))
public("woodbury", {"operator": LOW_RANK_OPERATOR}, operator=values.LOW_RANK)
public("sherman_morrison", {"operator": LOW_RANK_OPERATOR}, operator=values.LOW_RANK)
ITERATED = {"matvec": FUNCTION,
    "start": among("x", 1, torch.ones(3), torch.ones(3, 2).long(), torch.ones(3, 2) * 1j, torch.ones(2, 3),
        torch.ones(3, 0), torch.ones(0, 2), torch.ones(2, 3, 2), *NOTHING),
    "rank": st.one_of(integer(optional=True), st.integers(min_value=3))}
public("power_iteration", {"matvec": lambda v: v, "start": torch.ones(3, 2)}, **ITERATED, max_iterations=integer(),
    tolerance=number(0))
public("subspace_iteration", {"matvec": lambda v: v, "start": torch.ones(3, 2)}, **ITERATED, iterations=integer())

# Trees.
public("check_replicas", {"tree": P, "group": Processes("alone", 0, 1)}, group=NOT_GROUPS, tree=st.nothing(),
    what=st.nothing())
public("materialize", {"x": P}, x=among(1, "x", 1j, object(), [1.0], {"x": "y"}, (torch.ones(2), "x")))
public("unshard", {"tree": P}, tree=st.nothing())
public("apply_updates", {"params": P, "updates": G}, params=tree(P, shapes=False), updates=NOT_TREES)
public("state_dict", {"tree": FLAT}, tree=NOT_LEAVES)
WRONG_DICTIONARIES = [{**FLAT, "w": torch.ones(3, 2)}, {**FLAT, "w": torch.ones(2, 3).double()}, {**FLAT, "step": 3.0}]
WRONG_DICTIONARIES += [{"w": FLAT["w"]}, {**FLAT, "more": 1}, {**FLAT, "w": None}, {**FLAT, "step": torch.tensor(3)}]
WRONG_DICTIONARIES += [{**FLAT, "w": "x"}, {**FLAT, "w": torch.ones(2, 3, device="meta")}]
public("from_state_dict", {"like": FLAT, "state_dict": FLAT}, like=NOT_LEAVES,
    state_dict=among(1, "x", *WRONG_DICTIONARIES, *NOTHING))
NOT_FOLDERS = among("", str(FOLDER), str(FOLDER / "none" / "x"), FOLDER)
NOT_CHECKPOINTS = {"params": NOT_LEAVES, "state": NOT_LEAVES, "layers": NOT_LAYERS.filter(lambda x: x is not None)}
public("save", {"path": FOLDER / "x", "params": P, "state": (FLAT,), "layers": LAYERS},
    path=st.one_of(values.PATH, NOT_FOLDERS), **NOT_CHECKPOINTS)
public("load", {"path": SAVED, "params": P, "state": (FLAT,), "layers": LAYERS},
    path=st.one_of(values.PATH, NOT_FOLDERS, among(FOLDER / "none", __file__)),
    params=st.one_of(NOT_LEAVES, tree(P, optional=True)), state=st.one_of(NOT_LEAVES, among((), FLAT, (FLAT, 1))),
    layers=NOT_CHECKPOINTS["layers"])
