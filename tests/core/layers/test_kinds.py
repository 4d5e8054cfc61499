"""Each kind of layer: a call is parsed to an operation that is torch's and a transpose that is its derivative."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from lrkfac.core.layers import kinds
from lrkfac.core.layers.convolutions import CONVOLUTIONS
from lrkfac.core.layers.kinds import EMBEDDING, LINEAR, SCALE, SHIFT
from lrkfac.core.layers.parsers import PARSERS
from lrkfac.core.layers.placement import IN_FRONT
from lrkfac.core.layers.views import apply_view
from tests.tensors import close, normal

SETTINGS = [
    {}, {"stride": (2, 3)}, {"padding": 2}, {"stride": (2,), "padding": (1,), "dilation": (2,)}, {"padding": "same"},
    {"stride": [2, 1], "padding": [1, 0], "dilation": [1, 2]}, {"padding": "same", "dilation": (2, 1)},
    {"padding": "valid", "stride": 2}, {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
]  # fmt: skip
is_known = torch.is_tensor  # in these calls only the weight is asked about


def parsed(function, *args, **kwargs):
    """The call, seen as one of whatever it is asked about."""
    return PARSERS[function](is_known, *args, **kwargs)


def by_group(call, a):
    """The operation of each group on its channels, side by side, without the bias."""
    groups, channel = call.kind.groups(call.options), call.kind.channel(call.options)
    weights = apply_view(call.turn, call.weight).chunk(groups)
    parts = zip(a.chunk(groups, channel), weights, strict=True)
    return torch.cat([call.kind.operation(one, w, call.options) for one, w in parts], channel)


AXES = {1: (9,), 2: (9, 10), 3: (7, 4, 3)}
OF_ANY_AXES = [{}, {"stride": 2, "padding": 1}, {"padding": "same"}, {"dilation": 2}]
OUTPUT_PADDING = {"stride": 3, "padding": 1, "output_padding": 1, "dilation": 2}


def calls():
    """Of functions of torch: their names, kernels and settings."""
    for kernel, settings in product([(3, 3), (1, 1), (2, 4)], SETTINGS):
        yield "conv2d", kernel, settings
    for axes in AXES:
        yield from ((f"conv{axes}d", (4, 2, 2)[:axes], settings) for settings in OF_ANY_AXES)
        yield from (
            (f"conv_transpose{axes}d", (3, 2, 2)[:axes], settings) for settings in (*OF_ANY_AXES[:2], OUTPUT_PADDING)
        )


@pytest.mark.parametrize(("name", "kernel", "settings"), list(calls()), ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(name, kernel, settings, groups):
    """``operation`` is torch's, ``transpose`` its derivative, group by group, however the arguments are passed."""
    function, axes, transposed = getattr(F, name), len(kernel), "transpose" in name
    x, w = normal(2, 4, *AXES[axes]), normal(*((4, 3) if transposed else (6, 4 // groups)), *kernel, seed=1)
    b = normal(3 * groups if transposed else 6, seed=2)
    call = parsed(function, x, w, b, groups=groups, **settings)
    kind, channel = call.kind, call.kind.channel(call.options)
    assert kind is (kinds.TRANSPOSED_CONVOLUTIONS if transposed else CONVOLUTIONS)[axes]
    assert call.input is x and call.weight is w and call.bias is b
    assert kind.groups(call.options) == groups and hash(call.options) is not None
    expected, pullback = torch.func.vjp(lambda w: function(x, w, groups=groups, **settings), w)
    g = normal(*expected.shape, seed=5)
    a, prepared = kind.prepare(x, g[None], len(x), call.options, IN_FRONT)
    close(by_group(call, a), expected)
    parts = zip(a.chunk(groups, channel), prepared[0].chunk(groups, channel), strict=True)
    d = apply_view(call.turn, w).shape[1]
    found = torch.cat([kind.transpose(one, gradient, d, call.options) for one, gradient in parts])
    close(found, apply_view(call.turn, pullback(g)[0]))
    more = {"output_padding": 0, "groups": groups, "dilation": 1} if transposed else {"dilation": 1, "groups": groups}
    assert parsed(function, x, w, b, *({"stride": 1, "padding": 0} | more | settings).values()) == call
    assert parsed(function, input=x, weight=w, groups=groups, **settings) == call._replace(bias=None)


EINSUM = {
    "rows": ("nd,cd->nc", (5, 3), (4, 3)),
    "turned": ("dc,nd->nc", (5, 3), (3, 4)),
    "dots": ("...d,cd->...c", (5, 2, 3), (4, 3)),
    "heads": ("nti,hji->nhtj", (5, 2, 3), (4, 6, 3)),
    "several contracted": ("nhtj,ihj->nti", (5, 4, 2, 3), (6, 4, 3)),
    "output in another order": ("ntd,cd->cnt", (5, 2, 3), (4, 3)),
}


@pytest.mark.parametrize(("equation", "shape", "of_weight"), EINSUM.values(), ids=EINSUM.keys())
def test_einsum_is_linear(equation, shape, of_weight):
    x, w = normal(*shape), normal(*of_weight, seed=1)
    operands = (w, x) if equation.split(",")[0] == "dc" else (x, w)
    call = PARSERS[torch.einsum](lambda a: a is w, equation, *operands)
    run = lambda w: torch.einsum(equation, *[w if o.shape == w.shape else o for o in operands])  # noqa: E731
    expected, pullback = torch.func.vjp(run, w)
    g, matrix = normal(*expected.shape, seed=5), apply_view(call.turn, w)
    a, prepared = LINEAR.prepare(call.input, torch.stack([expected, g]), 5, call.options, IN_FRONT)
    close((a @ matrix.mT).reshape(-1, len(matrix)), prepared[0].reshape(-1, len(matrix)))
    close(LINEAR.transpose(a, prepared[1], matrix.shape[1], call.options), apply_view(call.turn, pullback(g)[0]))


COUNTS = {None: [2, 1, 2, 0, 0, 1], 2: [2, 1, 0, 0, 0, 1], -1: [2, 1, 2, 0, 0, 0]}


@pytest.mark.parametrize("padding", COUNTS)
def test_embedding_is_linear_in_one_hot_rows(padding):
    numbers, w = torch.tensor([[0, 2, 2], [5, 1, 0]]), normal(6, 3)
    call = parsed(F.embedding, numbers, w, padding)
    expected, pullback = torch.func.vjp(lambda w: F.embedding(numbers, w, padding), w)
    g = normal(*expected.shape, seed=5)
    a, prepared = EMBEDDING.prepare(numbers, g[None], 2, call.options, IN_FRONT)
    assert call.kind is EMBEDDING and EMBEDDING.one_hot
    close(EMBEDDING.transpose(a, prepared[0], 3, call.options), pullback(g)[0])
    assert kinds.counts(numbers, 6, padding=call.options[1]).tolist() == COUNTS[padding]
    assert parsed(F.embedding, numbers, w, max_norm=1.0) is parsed(F.embedding, numbers, w, scale_grad_by_freq=True)


@pytest.mark.parametrize("shape", [(3,), (4, 1), (4, 3), (1, 3), (1,), (), (2, 4, 3)], ids=str)
@pytest.mark.parametrize(("kind", "function"), [(SCALE, torch.mul), (SHIFT, torch.add)], ids=["scale", "shift"])
def test_scale_and_shift_are_broadcast(shape, kind, function):
    x, w = normal(5, 2, 4, 3), normal(*shape, seed=1)
    call = PARSERS[function](lambda a: a is w, x, w)
    expected, pullback = torch.func.vjp(lambda w: function(x, w), w)
    g = normal(*expected.shape, seed=5)
    a, prepared = kind.prepare(call.input, g[None], 5, call.options, IN_FRONT)
    assert call.kind is kind and kind.unit_wise and a.shape == prepared.shape[1:] == (5, a.shape[1], w.numel())
    close(kind.transpose(a, prepared[0], 1, call.options), apply_view(call.turn, pullback(g)[0]))
