"""Valid calls of the optimizer class, and for each of their arguments what it may not be."""

import torch
from hypothesis import strategies as st

import lrkfac
from tests import public_calls as of
from tests.bad_values import FLAG, FUNCTION, LIKELIHOOD, among, integer, number
from tests.public_calls import NET, VALID, X, Y, public, valid

OPTIMIZER = lrkfac.LowRankKFAC(NET, lrkfac.categorical(), X, 0.1, rank=1)
NOT_STATE_DICTS = among(
    *[1, "x", None, {}, {"state": {}}, [], 1j],
    torch.optim.SGD(NET.parameters(), 0.1).state_dict(),
    lrkfac.LowRankKFAC(NET, lrkfac.categorical(), X, transformation=lrkfac.adaptive_low_rank_kfac).state_dict(),
    {**OPTIMIZER.state_dict(), "param_groups": []},
)
STATISTICS = of.NOT_STATISTICS.filter(lambda x: x is not None)
public(
    "LowRankKFAC",
    {"module": NET, "likelihood": lrkfac.categorical(), "inputs": X, "lr": 0.1},
    **{name: VALID["evaluator"].bad[name] for name in ("estimator", "samples", "group")},
    module=VALID["from_module"].bad["module"],
    likelihood=LIKELIHOOD,
    inputs=VALID["find_layers"].bad["inputs"],
    lr=number(0).filter(lambda x: getattr(x, "shape", ()) != (1, 1)),  # one entry is a number
    params=among(
        *[1, "x", [], X, [X], {"params": [NET[0].weight]}, [{"lr": 0.1}], [{"params": []}], [1], object()],
        *[[{"params": [X]}], [{"params": [NET[0].weight], "rank": 1}], [NET[0].weight, "x"]],
    ),
    transformation=st.one_of(FUNCTION, st.just(lambda *_: 1)),
    **{name: VALID["find_layers"].bad[name] for name in ("kinds", "batch_axes", "uncovered")},
    statistics_every=integer(),
    thin=FLAG.filter(lambda x: x is not None),
    output=among(1.5, True, (), [0], {}, 1j, object(), "logits", 0),
)
BAD = {"statistics": STATISTICS, "layers": of.NOT_NAMES, "examples": of.NOT_EXAMPLES}
EVALUATED = {"inputs": X, "targets": Y, "statistics": True}


def evaluate(**arguments):
    OPTIMIZER.evaluate(**arguments)
    OPTIMIZER.zero_grad()


valid("LowRankKFAC.evaluate", evaluate, EVALUATED, inputs=of.NOT_INPUTS, targets=of.NOT_TARGETS, **BAD)
TARGETS, STEPPED = of.NOT_TARGETS.filter(lambda x: x is not None), {"closure": X, "targets": Y, "statistics": True}
valid("LowRankKFAC.step", OPTIMIZER.step, STEPPED, targets=TARGETS, **BAD)
PART = lrkfac.LowRankKFAC(NET, lrkfac.categorical(), X, 0.1, params=NET[0].parameters(), rank=1)
valid(
    "LowRankKFAC.add_param_group",
    lambda param_group: (PART.add_param_group(param_group), PART.param_groups.pop()),
    {"param_group": {"params": NET[2].parameters()}},
    param_group=among(1, "x", None, {}, [], NET[2].parameters(), {"lr": 0.1}),
)
LOADED = {"state_dict": OPTIMIZER.state_dict()}
valid("LowRankKFAC.load_state_dict", OPTIMIZER.load_state_dict, LOADED, state_dict=NOT_STATE_DICTS)
