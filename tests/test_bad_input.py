"""What is refused, by an error that names the layer, parameter or argument, before anything has changed.

Bad values of single arguments are in ``tests/test_public_calls.py``; here are arguments that do not fit together.
"""

import optree
import pytest
import torch

import lrkfac
from lrkfac import evaluator, find_layers, low_rank_kfac, precondition_by_fisher
from lrkfac.structures import dense, diagonal, full, kronecker, unit_wise
from tests import cases
from tests.transforms.test_precondition import layers_and_evaluate

CASE = cases.LINEAR[0]
PARAMS, X, Y = CASE.params, CASE.inputs, CASE.targets
LAYERS, EVALUATE = layers_and_evaluate(CASE)
TX = low_rank_kfac(LAYERS, 0.1, rank=2, weight_decay=0.1)
E = EVALUATE(PARAMS)
STATE = TX.update(E.grads, TX.init(PARAMS), PARAMS, evaluation=E)[1]
OUTPUTS = CASE.model(PARAMS, X)
BUFFER = torch.ones(6, dtype=torch.float64)
DENSE = kronecker(dense(), dense())
OTHER_TREE = {k: p for k, p in PARAMS.items() if k != "2.bias"}


def evaluation(model=CASE.model, likelihood=None, inputs=X, targets=Y):
    return lambda: evaluator(model, likelihood or lrkfac.categorical(), LAYERS, "empirical")(PARAMS, inputs, targets)


def structure(*arguments, **options):
    return lambda: precondition_by_fisher(LAYERS, *arguments, **options)


def update(state):
    return lambda: precondition_by_fisher(LAYERS, rank=2).update(E.grads, state, PARAMS, evaluation=E)


def evaluate(model):
    evaluation(model)()


def find(model):
    find_layers(model, PARAMS, X)


def mutating(change):
    """The model, which changes ``BUFFER`` by the way."""
    return lambda params, x: (change(), CASE.model(params, x))[1]


MUTATIONS = {
    "method": lambda: BUFFER.mul_(0.9),
    "operator": lambda: BUFFER.__imul__(0.9),
    "function": lambda: torch.zero_(BUFFER),
    "out": lambda: torch.add(BUFFER, 1, out=BUFFER),
    "several at once": lambda: torch._foreach_add_([BUFFER], 1.0),
}
BAD_OUTPUTS = {
    "nothing": (lambda p, x: [CASE.model(p, x)].clear(), TypeError, "model: expected outputs.* got NoneType"),
    "dictionary": (lambda p, x: {"logits": CASE.model(p, x)}, TypeError, "model: expected outputs.* got dict.*joint"),
    "a list": (lambda p, x: [CASE.model(p, x)], TypeError, "model: expected outputs as a tensor.* got list"),
    "integers": (lambda p, x: CASE.model(p, x).long(), ValueError, "model: expected floating-point outputs"),
    "scalar": (lambda p, x: CASE.model(p, x).sum(), ValueError, "model: expected .* with a batch axis"),
}
TARGETS = {
    "probabilities": (None, OUTPUTS.softmax(-1), TypeError, "categorical: .* integers, got torch.float64"),
    "truth values": (None, Y > 0, TypeError, "categorical: .* integers, got torch.bool"),
    "list": (None, Y.tolist(), TypeError, "targets: expected a tensor, got list"),
    "integers": (lrkfac.gaussian(), OUTPUTS.long(), TypeError, "gaussian: .* floating-point targets, got torch.int64"),
    "ones": (lrkfac.bernoulli(), OUTPUTS.long(), TypeError, "bernoulli: .* floating-point targets, got torch.int64"),
}
DECIDED = {
    "one structure": DENSE, "an exact block": unit_wise(), "full": full(), "a function": lambda layer: DENSE,
    "patterns of all layers": {"0": DENSE, "*": diagonal()},
}  # fmt: skip
STATES = {
    "another structure": (precondition_by_fisher(LAYERS, DENSE).init(PARAMS), "averages of layer '0'"),
    "another rank": (precondition_by_fisher(LAYERS, rank=1).init(PARAMS), "averages of layer '0'"),
    "the whole model": (precondition_by_fisher(LAYERS, full()).init(PARAMS), "averages of the layers"),
    "other layers": (
        STATE[0]._replace(blocks={name: STATE[0].blocks[name] for name in ("0", "2")}),
        r"averages of the layers \['0', '2', '4'\], got \['0', '2'\]",
    ),
    "a chain": (STATE, "a PreconditionState, got tuple"),
}
MISSING = r".*missing \['2.bias'\]"
CALLS = {
    **{f"targets: {n}": (evaluation(likelihood=k, targets=t), e, w) for n, (k, t, e, w) in TARGETS.items()},
    **{f"outputs: {n}": (evaluation(model), error, words) for n, (model, error, words) in BAD_OUTPUTS.items()},
    **{
        f"{f.__name__}: buffer changed by {name}": (
            lambda f=f, m=m: f(m),
            ValueError,
            r"model: .* changes a tensor of shape \(6,\)",
        )
        for f in (find, evaluate)
        for name, m in {n: mutating(change) for n, change in MUTATIONS.items()}.items()
    },
    **{
        f"rank beside {n}": (structure(s, rank=3), ValueError, "rank: the structure decides for every layer.*rank=3")
        for n, s in DECIDED.items()
    },
    **{
        f"state of {name}": (update(state), ValueError, rf"state: expected {words}.*; pass what init\(\)")
        for name, (state, words) in STATES.items()
    },
    "a pattern of no layer": (structure({"conv*": DENSE}), ValueError, r"pattern 'conv\*' matches none of the layers"),
    "a pattern behind one that matches the same layers": (
        structure({"[02]": DENSE, "*": DENSE, "0": DENSE, "4": DENSE}),
        ValueError,
        r"structure: the pattern '0' decides for no layer: earlier patterns match \['0'\]",
    ),
    "a decay of one": (structure(decay=1), ValueError, r"decay: expected a finite number in \[0, 1\)"),
    "a truth value as a rank": (structure(rank=True), TypeError, "rank: expected an integer"),
    "no structure": (structure(dense()), TypeError, "structure: expected kron"),
    "product": (lambda: E.product(OTHER_TREE), ValueError, f"product: {MISSING}"),
    "quadratic": (lambda: E.quadratic(PARAMS, OTHER_TREE), ValueError, f"quadratic: {MISSING}"),
    "quadratic: u": (lambda: E.quadratic(OTHER_TREE, PARAMS), ValueError, f"quadratic: u{MISSING}"),
    "loss_at": (lambda: E.loss_at(OTHER_TREE), ValueError, f"loss_at: {MISSING}"),
    "an unknown layer": (lambda: LAYERS["x"], KeyError, r"no layer 'x'; the nearest are \['0', '2', '4'\]"),
    "a name that is nearly right": (lambda: LAYERS["00"], KeyError, r"no layer '00'; the nearest are \['0'\]"),
    "no evaluation": (lambda: TX.update(E.grads, STATE, PARAMS), TypeError, "evaluation is missing"),
    "another state": (lambda: TX.update(E.grads, STATE[:2], PARAMS, evaluation=E), ValueError, "state: expected"),
}


@pytest.mark.parametrize("call, error, words", CALLS.values(), ids=CALLS.keys())
def test_refused_before_anything_changes(call, error, words):
    arguments = (PARAMS, X, Y, STATE, E.grads, BUFFER)
    before = optree.tree_map(torch.clone, arguments)
    with pytest.raises(error, match=f"(?s){words}"):
        call()
    assert optree.tree_all(optree.tree_map(torch.equal, arguments, before))
