"""What is refused, by an error that names the layer, parameter or argument, before anything has changed."""

import math

import optree
import pytest
import torch
from torch import nn

import lrkfac
from lrkfac import evaluator, find_layers, kfac, low_rank_kfac, precondition_by_fisher
from tests import cases
from tests.transforms.test_precondition import layers_and_evaluate

CASE = cases.LINEAR[0]
PARAMS, X, Y = CASE.params, CASE.inputs, CASE.targets
LAYERS, EVALUATE = layers_and_evaluate(CASE)
TX = low_rank_kfac(LAYERS, 0.1, rank=2, weight_decay=0.1)
E = EVALUATE(PARAMS)
STATE = TX.update(E.grads, TX.init(PARAMS), PARAMS, evaluation=E)[1]
OUTPUTS = CASE.model(PARAMS, X)
NAN, INF = math.nan, math.inf

MAKERS = {
    "precondition_by_fisher": lambda **options: precondition_by_fisher(LAYERS, **options),
    "low_rank_kfac": lambda **options: low_rank_kfac(LAYERS, 0.1, **options),
    "kfac": lambda **options: kfac(LAYERS, 0.1, **options),
    "low_rank": lambda rank: lrkfac.structures.low_rank(rank),
    "low_rank_plus_diagonal": lambda rank: lrkfac.structures.low_rank_plus_diagonal(rank),
    "inverse": lambda damping: lrkfac.linalg.inverse(lrkfac.linalg.Diagonal(torch.ones(2)), damping),
}
ARGUMENTS = [
    *[("rank", value, ValueError, f"rank: expected an integer >= 1, got {value}") for value in (0, -3)],
    *[("rank", value, TypeError, "rank: expected an integer") for value in (2.0, 2.5, NAN, True, "2", None)],
    *[("damping", value, ValueError, f"damping: expected .*, got {value}") for value in (-1e-3, NAN, INF, -INF)],
    *[("damping", value, ValueError, f"damping: expected .*, got {value}") for value in (0, 0.0)],
    *[("decay", value, ValueError, r"decay: expected a finite number in \[0, 1\)") for value in (-0.1, 1, NAN)],
    *[("damping", value, TypeError, "damping: expected a number, got") for value in ("1", True, None)],
    *[("decay", value, TypeError, "decay: expected a number, got") for value in ("1", True, None)],
    *[("momentum", value, ValueError, r"momentum: expected a finite number in \[0, 1\)") for value in (-0.1, 1, NAN)],
    *[("weight_decay", value, ValueError, "weight_decay: expected a finite") for value in (-0.1, INF)],
    *[("kl_clip", value, ValueError, "kl_clip: expected a finite") for value in (0, -1e-3, NAN)],
]
TAKES = {
    "rank": ["precondition_by_fisher", "low_rank_kfac", "low_rank", "low_rank_plus_diagonal"],
    "damping": ["precondition_by_fisher", "low_rank_kfac", "kfac", "inverse"],
    "decay": ["precondition_by_fisher", "low_rank_kfac", "kfac"],
    **{name: ["low_rank_kfac", "kfac"] for name in ("momentum", "weight_decay", "kl_clip")},
}


@pytest.mark.parametrize(
    "maker, name, value, error, words",
    [
        pytest.param(maker, name, value, error, words, id=f"{maker}({name}={value!r})")
        for name, value, error, words in ARGUMENTS
        for maker in TAKES[name]
        if not (maker == "inverse" and value in (0, "1", True, None))
        if not (maker == "precondition_by_fisher" and name == "rank" and value is None)
    ],
)
def test_numbers_out_of_range(maker, name, value, error, words):
    with pytest.raises(error, match=words):
        MAKERS[maker](**{name: value})


def evaluation(**given):
    return lambda: evaluator(
        given.get("model", CASE.model), given.get("likelihood", lrkfac.categorical()), LAYERS, "empirical"
    )(
        given.get("params", PARAMS),
        given.get("inputs", X),
        given.get("targets", Y),
        statistics=given.get("statistics", True),
    )


CATEGORICAL, GAUSSIAN, BERNOULLI = lrkfac.categorical(), lrkfac.gaussian(), lrkfac.bernoulli()
TARGETS = {
    "class per output": (CATEGORICAL, torch.zeros(7, 3).long(), ValueError, r"categorical: .*\(7,\), got \(7, 3\)"),
    "too few": (CATEGORICAL, Y[:6], ValueError, r"categorical: expected targets of shape \(7,\), got \(6,\)"),
    "one": (CATEGORICAL, Y[0], ValueError, r"categorical: expected targets of shape \(7,\), got \(\)"),
    "probabilities": (CATEGORICAL, OUTPUTS.softmax(-1), TypeError, "categorical: .* integers, got torch.float64"),
    "floating classes": (CATEGORICAL, Y.float(), TypeError, "categorical: .* integers, got torch.float32"),
    "truth values": (CATEGORICAL, Y > 0, TypeError, "categorical: .* integers, got torch.bool"),
    "list": (CATEGORICAL, Y.tolist(), TypeError, "targets: expected a tensor, got list"),
    "column": (GAUSSIAN, OUTPUTS[:, :1], ValueError, r"gaussian: expected targets .* \(7, 3\), got \(7, 1\)"),
    "row": (GAUSSIAN, OUTPUTS[0], ValueError, r"gaussian: expected targets of shape \(7, 3\), got \(3,\)"),
    "integers": (GAUSSIAN, OUTPUTS.long(), TypeError, "gaussian: .* floating-point targets, got torch.int64"),
    "transposed": (BERNOULLI, OUTPUTS.sigmoid().mT, ValueError, r"bernoulli: .* \(7, 3\), got \(3, 7\)"),
    "ones": (BERNOULLI, OUTPUTS.long(), TypeError, "bernoulli: .* floating-point targets, got torch.int64"),
}


def without(name):
    return {k: p for k, p in PARAMS.items() if k != name}


TREES = {
    "missing": (without("2.bias"), r"missing \['2.bias'\]"),
    "unexpected": ({**PARAMS, "6.weight": PARAMS["4.weight"]}, r"unexpected \['6.weight'\]"),
    "renamed": ({**without("2.bias"), "2.b": PARAMS["2.bias"]}, r"missing \['2.bias'\], unexpected \['2.b'\]"),
    "nested": ({"net": PARAMS}, r"unexpected \['net.0.bias'"),
    "list": (list(PARAMS.values()), "the tree differs"),
    "wider": ({**PARAMS, "2.bias": torch.ones(5)}, r"'2.bias' of shape \(4,\), got \(5,\)"),
    "transposed": ({**PARAMS, "2.weight": PARAMS["2.weight"].mT}, r"'2.weight' of shape \(4, 6\), got \(6, 4\)"),
    "number": ({**PARAMS, "2.bias": 1.0}, r"'2.bias' of shape \(4,\), got float"),
}
TREE_USERS = {
    "evaluator": lambda tree: evaluation(params=tree)(),
    "evaluator without statistics": lambda tree: evaluation(params=tree, statistics=False)(),
    "init": TX.init,
    "update": lambda tree: TX.update(tree, STATE, PARAMS, evaluation=E),
    "update's params": lambda tree: TX.update(E.grads, STATE, tree, evaluation=E),
    "apply_updates": lambda tree: lrkfac.apply_updates(PARAMS, tree),
    "precondition_by_fisher's params": lambda tree: precondition_by_fisher(LAYERS, rank=2).update(
        E.grads, STATE[0], tree, evaluation=E
    ),
}

BUFFER = torch.ones(6, dtype=torch.float64)
NORM = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).double()


def mutating(change):
    """The model, which changes ``BUFFER`` by the way."""

    def model(params, x):
        change()
        return CASE.model(params, x)

    return model


MUTATIONS = {
    "method": lambda: BUFFER.mul_(0.9),
    "operator": lambda: BUFFER.__imul__(0.9),
    "index": lambda: BUFFER.__setitem__(0, 0.9),
    "function": lambda: torch.zero_(BUFFER),
    "out": lambda: torch.add(BUFFER, 1, out=BUFFER),
    "several at once": lambda: torch._foreach_add_([BUFFER], 1.0),
}
MODELS = {
    "nothing": (lambda p, x: [CASE.model(p, x)].clear(), TypeError, "model: expected outputs.* got NoneType"),
    "no layer": (lambda p, x: x * p["0.bias"][:5], ValueError, "no layer found.*0.bias"),
    "batch norm": (
        lambda p, x: torch.func.functional_call(NORM, p, (x,)),
        ValueError,
        "model: .* changes a tensor .*buffer.* from_module",
    ),
    **{
        f"buffer changed by {name}": (mutating(change), ValueError, r"model: .* changes a tensor of shape \(6,\)")
        for name, change in MUTATIONS.items()
    },
}
BAD_OUTPUTS = {
    "dictionary": (lambda p, x: {"logits": CASE.model(p, x)}, TypeError, "model: expected outputs.* got dict.*joint"),
    "a list": (lambda p, x: [CASE.model(p, x)], TypeError, "model: expected outputs as a tensor.* got list"),
    "integers": (lambda p, x: CASE.model(p, x).long(), ValueError, "model: expected floating-point outputs"),
    "scalar": (lambda p, x: CASE.model(p, x).sum(), ValueError, "model: expected .* with a batch axis"),
}


DENSE = lrkfac.structures.kronecker(lrkfac.structures.dense(), lrkfac.structures.dense())


def cut_state():
    """Without the last layer."""
    return STATE[0]._replace(blocks={name: STATE[0].blocks[name] for name in ("0", "2")})


CALLS = {
    **{f"targets: {n}": (evaluation(likelihood=k, targets=t), e, w) for n, (k, t, e, w) in TARGETS.items()},
    **{
        f"{user}: {name}": (lambda use=use, tree=tree: use(tree), ValueError, words)
        for user, use in TREE_USERS.items()
        for name, (tree, words) in TREES.items()
    },
    **{
        f"find_layers: {name}": (lambda model=model: find_layers(model, PARAMS, X), error, words)
        for name, (model, error, words) in MODELS.items()
        if name != "batch norm"
    },
    "find_layers: batch norm": (
        lambda: find_layers(MODELS["batch norm"][0], dict(NORM.named_parameters()), X),
        *MODELS["batch norm"][1:],
    ),
    **{
        f"evaluator: {name}": (evaluation(model=model), error, words)
        for name, (model, error, words) in {**MODELS, **BAD_OUTPUTS}.items()
        if name not in ("no layer", "batch norm")
    },
    "a pattern of no layer": (
        lambda: precondition_by_fisher(
            LAYERS, {"conv*": lrkfac.structures.kronecker(lrkfac.structures.dense(), lrkfac.structures.dense())}
        ),
        ValueError,
        r"structure: the pattern 'conv\*' matches none of the layers \['0', '2', '4'\]",
    ),
    **{
        f"{name} examples of none": (
            evaluation(likelihood=k, inputs=X[:0], targets=t[:0], statistics=statistics),
            ValueError,
            "inputs: the batch is empty",
        )
        for name, k, t in (("categorical", CATEGORICAL, Y), ("gaussian", GAUSSIAN, OUTPUTS))
        for statistics in (True, False)
    },
    "find_layers: a parameter that is no tensor": (
        lambda: find_layers(CASE.model, {**PARAMS, "0.bias": 1.0}, X),
        TypeError,
        "params: expected tensors, got float at '0.bias'",
    ),
    "a pattern behind one that matches the same layers": (
        lambda: precondition_by_fisher(LAYERS, {"[02]": DENSE, "*": DENSE, "0": DENSE, "4": DENSE}),
        ValueError,
        r"structure: the pattern '0' decides for no layer: earlier patterns match \['0'\]",
    ),
    **{
        f"rank beside {name}": (
            lambda structure=structure: precondition_by_fisher(LAYERS, structure, rank=3),
            ValueError,
            "rank: the structure decides for every layer.*rank=3",
        )
        for name, structure in {
            "one structure": DENSE,
            "an exact block": lrkfac.structures.unit_wise(),
            "full": lrkfac.structures.full(),
            "patterns of all layers": {"0": DENSE, "*": lrkfac.structures.diagonal()},
            "a function": lambda layer: DENSE,
        }.items()
    },
    **{
        f"{name} of another tree": (
            lambda call=call: call(E, without("2.bias")),
            ValueError,
            rf"{name}: .*missing \['2.bias'\]",
        )
        for name, call in {
            "product": lambda e, tree: e.product(tree),
            "quadratic": lambda e, tree: e.quadratic(PARAMS, tree),
            "quadratic: u": lambda e, tree: e.quadratic(tree, PARAMS),
            "loss_at": lambda e, tree: e.loss_at(tree),
        }.items()
    },
    "an unknown layer": (lambda: LAYERS["x"], KeyError, r"no layer 'x'; the nearest are \['0', '2', '4'\]"),
    "a name that is nearly right": (lambda: LAYERS["00"], KeyError, r"no layer '00'; the nearest are \['0'\]"),
    **{
        f"state of {name}": (
            lambda state=state: precondition_by_fisher(LAYERS, rank=2).update(E.grads, state, PARAMS, evaluation=E),
            ValueError,
            rf"state: expected {words}.*; pass what init\(\)",
        )
        for name, state, words in (
            ("another structure", precondition_by_fisher(LAYERS, DENSE).init(PARAMS), "averages of layer '0'"),
            ("another rank", precondition_by_fisher(LAYERS, rank=1).init(PARAMS), "averages of layer '0'"),
            (
                "the whole model",
                precondition_by_fisher(LAYERS, lrkfac.structures.full()).init(PARAMS),
                "averages of the layers",
            ),
            ("other layers", cut_state(), r"averages of the layers \['0', '2', '4'\], got \['0', '2'\]"),
            ("a chain", STATE, "a PreconditionState, got tuple"),
        )
    },
    "no structure": (
        lambda: precondition_by_fisher(LAYERS, lrkfac.structures.dense()),
        TypeError,
        "structure: expected kron",
    ),
    "no evaluation": (lambda: TX.update(E.grads, STATE, PARAMS), TypeError, "evaluation is missing"),
    "another state": (lambda: TX.update(E.grads, STATE[:2], PARAMS, evaluation=E), ValueError, "state: expected"),
}


@pytest.mark.parametrize("call, error, words", CALLS.values(), ids=CALLS.keys())
def test_refused_before_anything_changes(call, error, words):
    given = (PARAMS, X, Y, STATE, E.grads, BUFFER, dict(NORM.state_dict()))
    before = optree.tree_map(torch.clone, given)
    with pytest.raises(error, match=f"(?s){words}"):
        call()
    assert optree.tree_all(optree.tree_map(torch.equal, given, before))


def test_what_was_refused_leaves_no_trace():
    """The same functions go on as if nothing had happened."""
    expected = TX.update(E.grads, STATE, PARAMS, evaluation=E)
    with pytest.raises(ValueError):
        TX.update(without("2.bias"), STATE, PARAMS, evaluation=E)
    found = TX.update(E.grads, STATE, PARAMS, evaluation=E)
    assert optree.tree_all(optree.tree_map(torch.equal, found, expected))
