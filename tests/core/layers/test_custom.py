"""Custom layer kinds: all that a linear layer on the explicit rows gives."""

from dataclasses import replace
from operator import itemgetter

import optree
import pytest
import torch
import torch.nn.functional as F

import lrkfac
from lrkfac import LayerKind
from lrkfac.core.curvature.covariances import kronecker_factors
from lrkfac.structures import layer_wise
from tests.compiling import traced
from tests.tensors import close, normal
from tests.travelling import each_way

DOUBLE = torch.float64


def circular(x, w, b=None, power=1):
    """``s_t = Σ_j w_j f(x)_{t + j} + b`` with the same number for all ``t``."""
    y = torch.fft.irfft(torch.fft.rfft(x.tanh() ** power) * torch.fft.rfft(w).conj(), n=x.shape[-1])
    return y if b is None else y + b


def many_circular(x, w, power):
    spectrum = torch.fft.rfft(x.tanh() ** power)[:, None] * torch.fft.rfft(w).conj()
    return torch.fft.irfft(spectrum, n=x.shape[-1]).mT


def pairs(x, y, w, b):
    """``s_k = xᵀ W_k y + b_k``."""
    return torch.einsum("ni,kij,nj->nk", x, w, y) + b


def patches(x, w):
    """A convolution of width 3 with ``w`` ``[d_in, d_out, 3]``, channels in the middle."""
    return F.conv1d(x, w.transpose(0, 1))


def parts_of_circular(x, w, b=None, power=1):
    return x, w, b, (power,)


def parts_of_pairs(x, y, w, b):
    return (x[:, :, None] * y[:, None, :]).flatten(1), w, b


def many_pairs(a, w):
    return a @ w.mT


def many_patches(a, w):
    return F.conv1d(a, w.unflatten(1, (-1, 3)))


KINDS = {
    "circular": LayerKind("circular", circular, many_circular, parts_of_circular, weight_axis=None),
    "pairs": LayerKind("pairs", pairs, many_pairs, parts_of_pairs),
    "patches": LayerKind("patches", patches, many_patches, weight_axis=1, channel=-2),
}


def rows_of_circular(x, power):
    n = x.shape[1]
    return torch.stack([(x.tanh() ** power).roll(-t, 1) for t in range(n)], dim=1)


MODELS = {
    "circular": (
        lambda p, x: KINDS["circular"](x, p["w"], p["b"], power=2).tanh() @ p["head"],
        lambda p, x: F.linear(rows_of_circular(x, 2), p["w"].reshape(1, -1), p["b"])[..., 0].tanh() @ p["head"],
        {"w": (6,), "b": (1,), "head": (6, 3)},
    ),
    "pairs": (
        lambda p, x: KINDS["pairs"](x, x.cos(), p["w"], p["b"]).tanh() @ p["head"],
        lambda p, x: (
            F.linear((x[:, :, None] * x.cos()[:, None, :]).flatten(1), p["w"].flatten(1), p["b"]).tanh() @ p["head"]
        ),
        {"w": (4, 6, 6), "b": (4,), "head": (4, 3)},
    ),
    "patches": (
        lambda p, x: KINDS["patches"](x.unflatten(1, (2, 3)).repeat(1, 1, 2), p["w"]).tanh().mean(2) @ p["head"],
        lambda p, x: (
            torch.stack([x.unflatten(1, (2, 3)).repeat(1, 1, 2)[:, :, t : t + 3].flatten(1) for t in range(4)], 1)
            @ p["w"].transpose(0, 1).reshape(4, 6).mT
        ).tanh().mean(1) @ p["head"],
        {"w": (2, 4, 3), "head": (4, 3)},
    ),
}  # fmt: skip
each = pytest.mark.parametrize("name", KINDS)
X, Y = normal(5, 6), torch.tensor([0, 2, 1, 1, 0])
NOISE = normal(1, 5, 3, seed=1).sigmoid()


def made(name, **options):
    """The model with the custom kind, the one with explicit rows, parameters; the layers of both."""
    custom, explicit, shapes = MODELS[name]
    params = {k: normal(*shape, seed=i) for i, (k, shape) in enumerate(shapes.items(), 2)}
    layers = lrkfac.find_layers(custom, params, X, kinds=(*KINDS.values(),), **options)
    return custom, explicit, params, layers, lrkfac.find_layers(explicit, params, X, **options)


@each
@pytest.mark.parametrize("estimator, bias", [("exact", "separate"), ("mc", "joint"), ("forward_only", "joint")])
def test_gradients_factors_and_blocks_are_those_of_the_explicit_rows(name, estimator, bias):
    custom, explicit, params, *both = made(name, bias=bias)
    described = [(x["w"].d_in, x["w"].d_out, x.uncovered) for x in both]
    assert both[0]["w"].kind == name and name in str(both[0]) and described[0] == described[1]
    noise, updates, factors = {"noise": NOISE} if estimator == "mc" else {}, [], []
    for model, layers in zip((custom, explicit), both, strict=True):
        e = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator)(params, X, Y, **noise)
        close(e.grads, torch.func.grad(lambda p: F.cross_entropy(custom(p, X), Y))(params))
        inputs, gradients, scale, _ = e.statistics
        of = lambda t, args=(layers["w"], inputs["w"], gradients["w"], scale): kronecker_factors(*args, t)  # noqa: E731
        factors.append([*of("expand"), *of("reduce")])
        if estimator == "exact":
            tx = lrkfac.precondition_by_fisher(layers, layer_wise())
            updates.append(tx.update(e.grads, tx.init(params), params, evaluation=e)[0])
    for one, other in zip(*factors, strict=True):
        matrix = other.dense()
        some = torch.randn(len(matrix), 2, dtype=DOUBLE)
        close((one.dense(), one.diagonal(), one.trace()), (matrix, matrix.diagonal(), matrix.trace()))
        close(one.matvec(some), matrix @ some)
    if updates:
        close(*updates, 1e-7, 1e-7)


@each
@each_way
def test_kinds_and_layers_travel(name, way):
    """The model calls the kind that it knows; the layers that arrive know it by its value."""
    custom, _, params, layers, _ = made(name)
    expected = lrkfac.evaluator(custom, lrkfac.categorical(), layers, "exact")(params, X, Y)
    kind, arrived = way((KINDS[name], layers))
    assert kind == KINDS[name] and arrived == layers
    found = lrkfac.evaluator(custom, lrkfac.categorical(), arrived, "exact")(params, X, Y)
    assert optree.tree_all(optree.tree_map(torch.equal, found.statistics, expected.statistics))


@pytest.mark.slow
def test_compiled():
    custom, _, params, layers, _ = made("circular")
    evaluate = lrkfac.evaluator(custom, lrkfac.categorical(), layers, "empirical")
    run = lambda params: itemgetter("grads", "statistics")(evaluate(params, X, Y)._asdict())  # noqa: E731
    close(traced(run)(params), run(params))


def test_functions_of_torch_in_an_unmodified_module():
    model, params = lrkfac.from_module(torch.nn.Bilinear(3, 4, 2).double())
    x, y = (normal(5, 3), normal(5, 4, seed=1)), torch.tensor([0, 1, 1, 0, 1])
    kind = replace(KINDS["pairs"], name="bilinear", function=F.bilinear)
    layers = lrkfac.find_layers(model, params, x, kinds=[kind], strict=True)
    assert [layer.kind for layer in layers] == ["bilinear"]
    e = lrkfac.evaluator(model, lrkfac.categorical(), layers)(params, x, y)
    close(e.grads, torch.func.grad(lambda p: F.cross_entropy(model(p, x), y))(params))


def test_an_operation_of_another_shape_is_refused():
    params = made("circular")[2]
    wrong = replace(KINDS["circular"], name="wrong", operation=lambda x, w, power: x @ w.mT)
    with pytest.raises(ValueError, match=r"kinds: 'wrong': expected its operation to return the shape \(5, 6, 1\)"):
        lrkfac.find_layers(lambda p, x: wrong(x, p["w"], power=2), params, X, kinds=[wrong])


def test_an_input_without_the_batch_in_front_is_not_covered():
    kind = LayerKind("turned", lambda x, w: x @ w.mT, lambda x, w: x @ w.mT)
    params = {"w": torch.randn(2, 5, dtype=DOUBLE), "head": torch.randn(6, 2, dtype=DOUBLE)}
    layers = lrkfac.find_layers(lambda p, x: (x @ p["head"]) + kind(x.mT, p["w"]).mT.sum(), params, X, kinds=[kind])
    assert ["used by turned where it is not known which rows belong to which example"] == [
        reason for _, reason in layers.uncovered
    ]


def test_a_kind_that_find_layers_was_not_given_is_named_with_the_remedy():
    kind = KINDS["pairs"]
    model = lambda params, x: kind(x, x.cos(), params["w"], params["b"])  # noqa: E731
    params = {"w": torch.randn(4, 6, 6, dtype=DOUBLE), "b": torch.randn(4, dtype=DOUBLE)}
    other = replace(kind, name="another")
    with pytest.raises(ValueError, match=r"LayerKind\('pairs'\) \(pass kinds=\[...\] with it to find_layers\)"):
        lrkfac.find_layers(model, params, X, strict=True, kinds=[other])
    assert lrkfac.find_layers(model, params, X, strict=True, kinds=[other, kind])["w"].kind == "pairs"
