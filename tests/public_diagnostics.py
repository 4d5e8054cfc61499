"""A valid call of what looks into states and layers, and for each of its arguments what it may not be."""

from hypothesis import strategies as st

import lrkfac
from tests.bad_values import DTYPE, NOTHING, among, integer, number
from tests.public_calls import LAYERS, NOT_LAYERS, E, G, P, public
from tests.public_transformations import NOT_TREES, PRECONDITION, RANK, STRUCTURE

STATE = PRECONDITION.init(P)
OF_THE_WHOLE = lrkfac.precondition_by_fisher(LAYERS, lrkfac.structures.full()).init(P)
NOT_STATES = among(1, "x", lrkfac.trace(0.9).init(P), (STATE, STATE), *[x for x in NOTHING if x is not None])
public(
    "diagnose",
    {"state": STATE, "layers": LAYERS, "updates": G},
    state=st.one_of(NOT_STATES, st.none()),
    layers=NOT_LAYERS,
    previous=st.one_of(NOT_STATES, st.just(OF_THE_WHOLE)),
    updates=NOT_TREES.filter(lambda x: x is not None),
)
OF_LAYERS = {"structure": STRUCTURE, "rank": RANK, "dtype": DTYPE.filter(lambda x: x is not None)}
public("explain", {"layers": LAYERS}, layers=NOT_LAYERS, budget=integer(optional=True), **OF_LAYERS)
public(
    "ranks_by_trace",
    {"state": PRECONDITION.update(G, STATE, P, evaluation=E)[1], "layers": LAYERS},
    state=st.one_of(NOT_STATES, st.none(), st.just(STATE)),
    layers=NOT_LAYERS,
    share=number(0, 2, includes_low=False),
)
public("round_robin_refresh", {"layers": LAYERS, "every": 3}, layers=NOT_LAYERS, every=integer())
WRONG = 1, "x", STATE, {"0": STATE.factors["0"]}, {**STATE.factors, "0": 1}, *[x for x in NOTHING if x != {}]
NOT_BEFORE = among(*[x for x in WRONG if not isinstance(x, dict) or 1 in x.values()])
BOTH = {"before": STATE.factors, "after": STATE.factors}
public("factor_drift", BOTH, before=NOT_BEFORE, after=among(*WRONG))
