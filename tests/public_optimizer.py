"""Valid calls of the optimizer class, and for each of their arguments what it may not be."""

import torch
from hypothesis import strategies as st

import lrkfac
from tests.bad_values import FLAG, FUNCTION, LIKELIHOOD, among, integer, number
from tests.public_calls import (
    NET,
    NOT_EXAMPLES,
    NOT_INPUTS,
    NOT_NAMES,
    NOT_STATISTICS,
    NOT_TARGETS,
    VALID,
    X,
    Y,
    public,
    valid,
)

OPTIMIZER = lrkfac.LowRankKFAC(NET, lrkfac.categorical(), X, 0.1, rank=1)
NOT_STATE_DICTS = among(
    *[1, "x", None, {}, {"state": {}}, [], 1j],
    torch.optim.SGD(NET.parameters(), 0.1).state_dict(),
    lrkfac.LowRankKFAC(NET, lrkfac.categorical(), X, transformation=lrkfac.adaptive_low_rank_kfac).state_dict(),
    {**OPTIMIZER.state_dict(), "param_groups": []},
)
public(
    "LowRankKFAC",
    {"module": NET, "likelihood": lrkfac.categorical(), "inputs": X, "lr": 0.1},
    module=VALID["from_module"].bad["module"],
    likelihood=LIKELIHOOD,
    inputs=VALID["find_layers"].bad["inputs"],
    lr=number(0),
    params=among(
        *[1, "x", [], X, [X], {"params": [NET[0].weight]}, [{"lr": 0.1}], [{"params": []}], [1], object()],
        *[[{"params": [X]}], [{"params": [NET[0].weight], "rank": 1}], [NET[0].weight, "x"]],
    ),
    transformation=st.one_of(FUNCTION, st.just(lambda *_: 1)),
    statistics_every=integer(),
    **{name: VALID["evaluator"].bad[name] for name in ("estimator", "samples")},
    thin=FLAG.filter(lambda x: x is not None),
    output=among(1.5, True, (), [0], {}, 1j, object(), "logits", 0),
)
valid(
    "LowRankKFAC.evaluate",
    OPTIMIZER.evaluate,
    {"inputs": X, "targets": Y, "statistics": True},
    inputs=NOT_INPUTS,
    targets=NOT_TARGETS,
    statistics=NOT_STATISTICS.filter(lambda x: x is not None),
    layers=NOT_NAMES,
    examples=NOT_EXAMPLES,
)
valid(
    "LowRankKFAC.step",
    OPTIMIZER.step,
    {"closure": X, "targets": Y, "statistics": True},
    targets=NOT_TARGETS.filter(lambda x: x is not None),
    statistics=NOT_STATISTICS.filter(lambda x: x is not None),
    layers=NOT_NAMES,
    examples=NOT_EXAMPLES,
)
PART = lrkfac.LowRankKFAC(NET, lrkfac.categorical(), X, 0.1, params=NET[0].parameters(), rank=1)
valid(
    "LowRankKFAC.add_param_group",
    lambda param_group: (PART.add_param_group(param_group), PART.param_groups.pop()),
    {"param_group": {"params": NET[2].parameters()}},
    param_group=among(1, "x", None, {}, [], NET[2].parameters(), {"lr": 0.1}),
)
valid(
    "LowRankKFAC.load_state_dict",
    OPTIMIZER.load_state_dict,
    {"state_dict": OPTIMIZER.state_dict()},
    state_dict=NOT_STATE_DICTS,
)
