"""Every structure x kind of layer x estimator: the natural gradient of the reference, or the reason why not."""

from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lrkfac
from lrkfac import precondition_by_fisher
from lrkfac.core.layers.kinds import CUSTOM, KINDS
from lrkfac.structures import FactorStructure, dense, diagonal, full, kronecker, low_rank, low_rank_plus_diagonal
from tests import complex_operations
from tests import reference_kinds as reference

DAMPING = 0.03
REAL = reference.operations()
OPERATIONS = REAL | complex_operations.OPERATIONS
ESTIMATORS = ["exact", "mc", "empirical", "forward_only"]


@dataclass(frozen=True)
class OfFullRank(FactorStructure):
    """As many eigenpairs as there are: ``fitted`` would hold the matrix itself."""

    make: Any
    init = update = operator = inverse = None

    def fitted(self, dimension):
        return self.make(dimension)


FACTORS = {
    "dense": dense(),
    "diagonal": diagonal(),
    "low_rank": OfFullRank(low_rank),
    "low_rank_plus_diagonal": OfFullRank(low_rank_plus_diagonal),
}
BLOCKS = {name: getattr(lrkfac.structures, name)() for name in ("full", "layer_wise", "unit_wise", "diagonal")}
each_operation = pytest.mark.parametrize("name", OPERATIONS)
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


@cache
def evaluated(name, estimator, samples=2):
    """The layers, parameters, evaluation, and the cotangents by which the reference comes to its statistics."""
    operation = OPERATIONS[name]
    params, inputs = reference.with_head(operation), operation.inputs
    model = partial(reference.network, operation)
    targets = torch.tensor([2, 0, 1, 1])
    options = {"bias": "separate" if name == "bias" else "joint", "kinds": complex_operations.KINDS}
    layers = lrkfac.find_layers(
        model, params, inputs, strict=True, uncovered="jacobian" if name == "jacobian" else "plain", **options
    )
    noise = torch.rand(samples, 4, reference.CLASSES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    options = {"samples": samples} if estimator == "mc" else {}
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator, **options)
    outputs = model(params, inputs)
    labels = {
        "exact": None,
        "mc": torch.stack([lrkfac.categorical().sample(outputs, u) for u in noise]),
        "empirical": targets[None],
    }
    cotangent = None if estimator == "forward_only" else reference.cotangents(outputs, labels[estimator])
    noise = noise if estimator == "mc" else None
    return layers, params, evaluate(params, inputs, targets, noise=noise), cotangent


def test_every_kind_of_layer_is_here():
    found = {kind for name in REAL for layer in evaluated(name, "empirical")[0] for kind in layer.kinds}
    assert found == set(KINDS) - {CUSTOM.name}  # whose tests are in tests/core/layers/test_custom.py
    for name, operation in REAL.items():
        assert operation.kind in {layer.kind for layer in evaluated(name, "empirical")[0]}


def places_of(params):
    """The place of each entry of each parameter in the flat gradient."""
    parts = torch.arange(sum(p.numel() for p in params.values())).split([p.numel() for p in params.values()])
    return {name: part.reshape(params[name].shape) for name, part in zip(params, parts, strict=True)}


def natural_gradient(name, estimator, structure):
    """That of lrkfac, flat."""
    layers, params, evaluation, _ = evaluated(name, estimator)
    tx = precondition_by_fisher(layers, structure, damping=DAMPING)
    updates, _ = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
    return flat(updates, params)


def flat(tree, params):
    return torch.cat([tree[name].flatten() for name in params])


def close(found, expected, what):
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= 1e-9, f"{what}: {error}"


def blocks_of(operation, places, name):
    """Rows of places that make a block each."""
    units = [unit(places) for unit in operation.units]
    matrices = [m(places).flatten(1) for m in operation.matrices] if operation.matrices else [units[0].reshape(1, -1)]
    head = places["head"]
    return {
        "full": [torch.cat([p.flatten() for p in places.values()])],
        "layer_wise": [*(row for m in matrices for row in m), head.flatten()],
        "unit_wise": [*(row for u in units for row in u), *head],
        "diagonal": torch.arange(sum(p.numel() for p in places.values()))[:, None],
    }[name]


def solved(matrix, gradient, blocks):
    natural = gradient.clone()
    for row in blocks:
        shifted = matrix[row[:, None], row] + DAMPING * torch.eye(len(row), dtype=torch.float64)
        natural[row] = torch.linalg.solve(shifted, gradient[row])
    return natural


@each_operation
@pytest.mark.parametrize("estimator", ESTIMATORS[:3])
def test_exact_blocks_are_those_of_the_explicit_matrix(name, estimator):
    operation = OPERATIONS[name]
    _, params, evaluation, cotangent = evaluated(name, estimator)
    places, gradient = places_of(params), flat(evaluation.grads, params)
    matrix = reference.fisher_matrix(operation, params, cotangent)
    for block, structure in BLOCKS.items():
        expected = solved(matrix, gradient, blocks_of(operation, places, block))
        close(natural_gradient(name, estimator, structure), expected, block)


@each_operation
@each_estimator
def test_kronecker_products_of_all_factors_are_those_of_the_reference(name, estimator):
    """Scales and shifts, which are no products, have their blocks; without output gradients theirs pass as they are.

    Every pair where the rows are those of the exact estimator; with the others, each factor once on either side.
    """
    operation = OPERATIONS[name]
    _, params, evaluation, cotangent = evaluated(name, estimator)
    places, gradient = places_of(params), flat(evaluation.grads, params)
    if operation.matrices is None and cotangent is not None:
        units = [row for unit in operation.units for row in unit(places)]
        gradient = solved(reference.fisher_matrix(operation, params, cotangent), gradient, units)
    matrices = operation.matrices or []
    head = reference.head_factors(operation, params, cotangent)
    whole = name in REAL and estimator == "exact"
    every = product(FACTORS, FACTORS) if whole else zip(FACTORS, reversed(FACTORS), strict=True)
    for treatment, pairs in {"expand": every, "reduce": [("dense", "dense")]}.items():
        found = [reference.factors(operation, params, cotangent, m, treatment == "reduce") for m in matrices]
        for input, output in pairs:
            expected = gradient
            for matrix, (A, B) in zip(matrices, found, strict=True):
                # An embedding's matrix is the transpose of the reference's; its one-hot side is always diagonal.
                sides = ("diagonal", input) if operation.one_hot else (input, output)
                A, B = reference.held(A, sides[0]), reference.held(B, sides[1])
                expected = reference.preconditioned(matrix(places), expected, A, B, DAMPING)
            A, B = reference.held(head[0], input), reference.held(head[1], output)
            expected = reference.preconditioned(places["head"][None], expected, A, B, DAMPING)
            structure = kronecker(FACTORS[input], FACTORS[output], treatment=treatment)
            close(natural_gradient(name, estimator, structure), expected, (treatment, input, output))


# What makes no sense ----------------------------------------------------------------------------------

TWO, ALONE = kronecker(dense(), dense()), r"a factor structure such as dense\(\) stands inside"
SENSELESS = [
    *[("linear", x, "forward_only", ValueError, "is held by an exact block.* use kronecker") for x in BLOCKS.values()],
    *[("linear", x, "exact", TypeError, ALONE) for x in (dense(), low_rank(2), low_rank_plus_diagonal(2))],
    *[(x, {"w": TWO}, "exact", ValueError, f"'w' is a {x}, whose .* use unit_wise") for x in ("scale", "shift")],
    ("linear", {"head": full()}, "exact", ValueError, r"full\(\) holds all layers .* cannot stand for 'head'"),
]


@pytest.mark.parametrize("name, structure, estimator, error, words", SENSELESS)
def test_what_makes_no_sense_is_refused(name, structure, estimator, error, words):
    with pytest.raises(error, match=words):
        natural_gradient(name, estimator, structure)


@pytest.mark.parametrize(
    "structure",
    [*BLOCKS.values(), kronecker(dense(), dense(), treatment="reduce"), kronecker(dense(), dense(), corrected=True)],
)
def test_exact_blocks_and_reduced_rows_need_to_know_the_examples(structure):
    """Rows from the last example to the first are none of the ways that are known."""
    params = {"w": torch.randn(3, 5), "head": torch.randn(3, 3)}
    model = lambda p, x: F.linear(torch.tanh(F.linear(x.flip(0), p["w"])).flip(0), p["head"])  # noqa: E731
    layers = lrkfac.find_layers(model, params, torch.randn(4, 5))
    assert not layers["w"].by_example and layers["head"].by_example
    with pytest.raises(ValueError, match="layer 'w': it is not known which rows belong to which example"):
        precondition_by_fisher(layers, structure)
