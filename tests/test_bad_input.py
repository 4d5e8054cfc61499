"""What is refused, by an error that names the layer, parameter or argument, before anything has changed.

Bad values of single arguments are in ``tests/test_public_calls.py``; here are arguments that do not fit together.
"""

from functools import partial

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
BUFFER = torch.ones(6, dtype=torch.float64)
DENSE = kronecker(dense(), dense())


def evaluate(model):
    evaluator(model, lrkfac.categorical(), LAYERS, "empirical")(PARAMS, X, Y)


def find(model):
    find_layers(model, PARAMS, X)


def structure(*arguments, **options):
    return partial(precondition_by_fisher, LAYERS, *arguments, **options)


MUTATIONS = {
    "method": lambda: BUFFER.mul_(0.9),
    "function": lambda: torch.zero_(BUFFER),
    "out": lambda: torch.add(BUFFER, 1, out=BUFFER),
    "several at once": lambda: torch._foreach_add_([BUFFER], 1.0),
}
BAD_OUTPUTS = {
    "nothing": (lambda y: None, TypeError, "model: expected outputs.* got NoneType"),
    "dictionary": (lambda y: {"scores": y}, TypeError, "model: expected outputs.* got dict.*joint"),
    "a list": (lambda y: [y], TypeError, "model: expected outputs as a tensor.* got list"),
    "integers": (torch.Tensor.long, ValueError, "model: expected floating-point outputs"),
    "scalar": (torch.sum, ValueError, "model: expected .* with a batch axis"),
}
DECIDED = {
    "one structure": DENSE, "an exact block": unit_wise(), "full": full(), "a function": lambda layer: DENSE,
    "patterns of all layers": {"0": DENSE, "*": diagonal()},
}  # fmt: skip
SOME_LAYERS = STATE[0]._replace(blocks={name: STATE[0].blocks[name] for name in ("0", "2")})
STATES = {
    "another structure": (precondition_by_fisher(LAYERS, DENSE).init(PARAMS), "averages of layer '0'"),
    "another rank": (precondition_by_fisher(LAYERS, rank=1).init(PARAMS), "averages of layer '0'"),
    "the whole model": (precondition_by_fisher(LAYERS, full()).init(PARAMS), "averages of the layers"),
    "other layers": (SOME_LAYERS, r"averages of the layers \['0', '2', '4'\], got \['0', '2'\]"),
    "a chain": (STATE, "a PreconditionState, got tuple"),
}
CALLS = {
    **{
        f"outputs: {n}": (lambda f=f: evaluate(lambda p, x: f(CASE.model(p, x))), error, words)
        for n, (f, error, words) in BAD_OUTPUTS.items()
    },
    **{
        f"{f.__name__}: buffer changed by {name}": (
            lambda f=f, change=change: f(lambda params, x: (change(), CASE.model(params, x))[1]),
            ValueError,
            r"model: .* changes a tensor of shape \(6,\)",
        )
        for f in (find, evaluate)
        for name, change in MUTATIONS.items()
    },
    **{
        f"rank beside {n}": (structure(s, rank=3), ValueError, "rank: the structure decides for every layer.*rank=3")
        for n, s in DECIDED.items()
    },
    **{
        f"state of {name}": (
            partial(structure(rank=2)().update, E.grads, state, PARAMS, evaluation=E),
            ValueError,
            rf"state: expected {words}.*; pass what init\(\)",
        )
        for name, (state, words) in STATES.items()
    },
    "a state of another chain": (
        lambda: lrkfac.checkpoint.from_state_dict(STATE, lrkfac.checkpoint.state_dict(TX.init(PARAMS)[0])),
        ValueError,
        r"of another transformation, structure or rank than like: missing \['0.*\] and \d+ more, unexpected",
    ),
    "a state of another rank": (
        lambda: lrkfac.checkpoint.from_state_dict(
            STATE, lrkfac.checkpoint.state_dict(low_rank_kfac(LAYERS, 0.1, rank=1).init(PARAMS))
        ),
        ValueError,
        "state_dict: .*with the same structure and rank",
    ),
    "a function in place of the likelihood that it makes": (
        lambda: evaluator(CASE.model, lrkfac.categorical, LAYERS),
        TypeError,
        r"likelihood: .* got <function categorical.*>; call it: categorical\(\)$",
    ),
    "one in place of a head": (
        lambda: lrkfac.joint({"x": lrkfac.gaussian}),
        TypeError,
        r"likelihoods: .* in it; call it: gaussian\(\)$",
    ),
    "another function as likelihood": (
        lambda: evaluator(CASE.model, torch.nn.functional.cross_entropy, LAYERS),
        TypeError,
        r"got <function [^;]*>$",
    ),
    "a pattern of no layer": (structure({"conv*": DENSE}), ValueError, r"pattern 'conv\*' matches none of the layers"),
    "a pattern behind one that matches the same layers": (
        structure({"[02]": DENSE, "*": DENSE, "0": DENSE, "4": DENSE}),
        ValueError,
        r"structure: the pattern '0' decides for no layer: earlier patterns match \['0'\]",
    ),
    "a decay of one": (structure(decay=1), ValueError, r"decay: expected a finite number in \[0, 1\)"),
    "a truth value as a rank": (structure(rank=True), TypeError, "rank: expected an integer"),
    "an unknown layer": (lambda: LAYERS["x"], KeyError, r"no layer 'x'; the nearest are \['0', '2', '4'\]"),
    "a name that is nearly right": (lambda: LAYERS["00"], KeyError, r"no layer '00'; the nearest are \['0'\]"),
}


@pytest.mark.parametrize("call, error, words", CALLS.values(), ids=CALLS.keys())
def test_refused_before_anything_changes(call, error, words):
    arguments = (PARAMS, X, Y, STATE, E.grads, BUFFER)
    before = optree.tree_map(torch.clone, arguments)
    with pytest.raises(error, match=f"(?s){words}"):
        call()
    assert optree.tree_all(optree.tree_map(torch.equal, arguments, before))
