"""Valid calls of the products with curvature matrices, and for each of their arguments what it may not be."""

import torch
from hypothesis import strategies as st

import lrkfac
from tests.bad_values import FLAG, FUNCTION, LIKELIHOOD, among, integer, number, one_of, tree
from tests.public import BY_SHORT_NAME
from tests.public_calls import LAYERS, MODEL, NOT_LAYERS, NOT_TREES, P, X, Y, container, public, valid

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

container("SpectralDensity")

public("ntk", {"model": MODEL}, model=FUNCTION, layers=NOT_LAYERS.filter(lambda x: x is not None), chunk=integer())
KERNEL = BY_SHORT_NAME["ntk"](MODEL, LAYERS)
of_kernel = {"params": NOT_TREES, "x1": among(X.to("meta")), "x2": among(X.to("meta"))}
valid("ntk()", KERNEL, {"params": P, "x1": X, "x2": X[:2]}, **of_kernel)

# Solvers and estimates, of vectors here; a function is no operator for a table, as it may be anything.
M = lrkfac.linalg.Dense(torch.eye(4) + torch.ones(4, 4))
NOT_VECTORS = among(1, "x", None, [], (), {}, 1j, object(), torch.ones(4).long(), torch.ones(4, device="meta"), [1.0])
NOT_OPERATORS = among(1, "x", None, torch.ones(4, 4), lrkfac.linalg.Dense(torch.eye(3)), lambda x: x[:1], lambda x: 1)
NOT_LIKE_B = among(1, "x", torch.ones(3), torch.ones(4, 1), torch.ones(4).long(), {"x": torch.ones(4)}, [1.0])
public(
    "conjugate_gradient",
    {"operator": M, "b": torch.ones(4)},
    operator=NOT_OPERATORS,
    b=NOT_VECTORS,
    preconditioner=NOT_OPERATORS.filter(lambda x: x is not None),
    damping=number(0),
    tolerance=number(0),
    max_iterations=integer(),
    start=NOT_LIKE_B,
)
OF_KRYLOV = {"operator": NOT_OPERATORS, "steps": among(0, -1, True, 1.0, "x", None, 5)}
public(
    "lanczos", {"operator": M, "start": torch.ones(4), "steps": 2}, start=NOT_VECTORS, reorthogonalize=FLAG, **OF_KRYLOV
)
public(
    "eigenvalues",
    {"operator": M, "start": torch.eye(4)[:, :2]},
    operator=NOT_OPERATORS,
    start=among(
        torch.ones(4, 2).long(),
        torch.ones(4, 0),
        torch.ones(4, 5),
        {"a": torch.ones(2, 1), "b": torch.ones(3, 1)},
        1,
        "x",
        None,
        torch.ones(4),
    ),
    rank=among(0, 3, True, 1.0, "x"),
    which=one_of("magnitude", "largest", "smallest"),
    tolerance=number(0),
    max_iterations=integer(),
    max_vectors=among(0, 3, True, 30.0, "x"),
)
NOISE = {"operator": M, "samples": 2, "noise": torch.eye(4)[:, :2]}
OF_PROBES = {
    "operator": NOT_OPERATORS,
    "generator": among(1, "x", torch.Generator, torch.Generator()),
    "noise": among(1, "x", None, torch.ones(4), torch.ones(4, 3), torch.ones(4, 2).long(), {"a": torch.ones(3, 4)}),
}
public(
    "spectral_density",
    {**NOISE, "steps": 2},
    samples=integer(),
    reorthogonalize=FLAG,
    like=st.nothing(),
    **OF_PROBES,
    steps=among(0, -1, True, 1.0, "x", None, 5),
)
for name in ("trace_estimate", "diagonal_estimate"):
    methods = ("xtrace", "hutch++", "hutchinson") if name[0] == "t" else ("xdiag", "hutchinson")
    public(name, NOISE, samples=integer(2), like=st.nothing(), method=one_of(*methods), **OF_PROBES)
    drawn = {"operator": lambda x: x, "samples": 2, "generator": torch.Generator(), "like": torch.ones(4)}
    valid(f"{name}(generator)", BY_SHORT_NAME[name], drawn, like=NOT_VECTORS)
