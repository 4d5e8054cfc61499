"""Valid calls of the uses of curvature, and for each of their arguments what it may not be."""

from hypothesis import strategies as st

import lrkfac
from tests.bad_values import FLAG, FUNCTION, NOTHING, among, integer, number, tree
from tests.public import BY_SHORT_NAME
from tests.public_calls import (
    EXACT,
    LAYERS,
    MODEL,
    NOT_LAYERS,
    NOT_TREES,
    WITHOUT,
    E,
    G,
    P,
    X,
    Y,
    container,
    public,
    valid,
)
from tests.public_diagnostics import NOT_STATES, OF_LAYERS, STATE
from tests.public_transformations import PRECONDITION

AFTER = PRECONDITION.update(G, STATE, P, evaluation=E)[1]
container("LayerBlocks")
public(
    "from_state",
    {"state": AFTER, "layers": LAYERS},
    state=st.one_of(NOT_STATES, st.none(), st.just(STATE), st.just((AFTER, AFTER))),
    layers=NOT_LAYERS,
)
NOT_BATCHES = among(1, None, [], (), {}, X, (X, Y), [X], [(X,)], [(X, Y, Y)], [1], iter([]))
ESTIMATE = {"evaluate": EXACT, "params": P, "batches": [(X, Y)], "layers": LAYERS}
public(
    "estimate",
    ESTIMATE,
    evaluate=st.one_of(FUNCTION.filter(lambda x: x is not print), among(lambda *_: 1)),
    params=tree(P),
    batches=NOT_BATCHES,
    layers=NOT_LAYERS,
    passes=integer(),
    progress=FUNCTION.filter(lambda x: x is not None),
    **OF_LAYERS,
)
CURVATURE = BY_SHORT_NAME["estimate"](**ESTIMATE)
valid("LayerBlocks.product", CURVATURE.product, {"tree": P}, tree=NOT_TREES)
valid("LayerBlocks.quadratic_form", CURVATURE.quadratic_form, {"tree": P}, tree=NOT_TREES)
valid("LayerBlocks.inverse", CURVATURE.inverse, {"damping": 1.0}, damping=number(0))
NOT_NAMES = among("x", ["x"], ["0", "x"], [1], *NOTHING)
valid("LayerBlocks.of_layers", CURVATURE.of_layers, {"names": ["0"]}, names=NOT_NAMES)
valid("LayerBlocks.solve", lambda tree: CURVATURE.damped(1.0).solve(tree), {"tree": P}, tree=NOT_TREES)
valid("LayerBlocks.sample", lambda noise: CURVATURE.damped(1.0).sample(noise), {"noise": P}, noise=NOT_TREES)
valid("LayerBlocks.damped", CURVATURE.damped, {"damping": 1.0}, damping=number(0))
valid("LayerBlocks.scale", CURVATURE.scale, {"c": 1.0}, c=number())

NOT_CURVATURES = among(1, "x", True, P, AFTER, *NOTHING)
POSITIVE = number(0, includes_low=False)
public(
    "laplace",
    {"curvature": CURVATURE, "params": P, "examples": 6},
    curvature=NOT_CURVATURES,
    params=tree(P),
    examples=POSITIVE,
    prior_precision=POSITIVE,
)
POSTERIOR = BY_SHORT_NAME["laplace"](CURVATURE, P, 6)
container("Laplace")
STACKED = {name: x[None] for name, x in P.items()}
valid("Laplace.sample", POSTERIOR.sample, {"noise": P}, noise=NOT_TREES)
NOT_MODELS = FUNCTION.filter(lambda x: x is not print)
valid("Laplace.predictive", POSTERIOR.predictive, {"model": MODEL, "inputs": X}, model=NOT_MODELS)
NOT_STACKED = among(1, "x", None, X, P, {}, {**STACKED, "0.bias": P["0.bias"]})
DRAWS = {"model": MODEL, "inputs": X, "noise": STACKED}
valid("Laplace.draws", POSTERIOR.draws, DRAWS, model=NOT_MODELS, noise=NOT_STACKED)
NOT_PRECISIONS = POSITIVE.filter(lambda x: x is not None)
EVIDENCE = {"loss": 1.0}
valid("Laplace.log_evidence", POSTERIOR.log_evidence, EVIDENCE, loss=number(), prior_precision=NOT_PRECISIONS)

ROWS = lrkfac.evaluator(MODEL, lrkfac.categorical(), LAYERS, "empirical")(P, X, Y)
INFLUENCE = {"curvature": CURVATURE, "queries": ROWS, "examples": ROWS, "damping": 0.1}
NOT_ROWS = among(1, "x", None, X, WITHOUT, EXACT(P, X, Y), P)
public(
    "influence",
    INFLUENCE,
    curvature=NOT_CURVATURES,
    queries=NOT_ROWS,
    examples=st.one_of(NOT_ROWS, among([], iter([]), [1])),
    damping=POSITIVE,
    exact=FLAG,
)
