"""Valid calls of the products with curvature matrices, and for each of their arguments what it may not be."""

import torch

import lrkfac
from tests.bad_values import FLAG, FUNCTION, LIKELIHOOD, among, integer, tree
from tests.public import BY_SHORT_NAME
from tests.public_calls import MODEL, NOT_TREES, P, X, Y, public, valid

NOT_PAIRS = among(1, "x", None, [], (), {}, X, (X, Y), [X], [(X,)], [(X, Y, Y)], iter([(X, Y)]), [1])
for name in ("ggn", "fisher_product", "hessian"):
    arguments = {"model": MODEL, "likelihood": lrkfac.categorical()}
    public(name, arguments, model=FUNCTION, likelihood=LIKELIHOOD, has_aux=FLAG, chunk=integer())
    at = BY_SHORT_NAME[name](**arguments)
    valid(f"{name}()", at, {"params": P, "batches": [(X, Y)]}, params=tree(P, shapes=False), batches=NOT_PAIRS)
    matrix = at(P, [(X, Y)])
    valid(f"{name}().product", matrix.product, {"tangent": P}, tangent=NOT_TREES)
    x = torch.ones(matrix.dimension, dtype=torch.float64)
    bad = among(1, "x", None, x[:-1], x[None], x.long(), x.tolist(), x.reshape(-1, 1, 1), *[P])
    valid(f"{name}().matvec", matrix.matvec, {"x": x}, x=bad)
MATRIX = BY_SHORT_NAME["ggn"](MODEL, lrkfac.categorical())
NOT_TARGETS = among(Y[:5], "x", None, Y.double(), Y.to("meta"))
valid("ggn(batch)()", lambda targets: MATRIX(P, [(X, targets)]).product(P), {"targets": Y}, targets=NOT_TARGETS)
