"""Each kind of layer: its operation is torch's, its transpose the adjoint, its rows the reference's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lrkfac.core.layers import BIAS, CONV2D, KIND_OF, KINDS, LINEAR
from lrkfac.testing import layers, seeds
from tests import reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected, dtype=torch.float64):
    """With a tolerance relative to the norm."""
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).norm() <= TOLERANCE[dtype] * (1e-3 + expected.double().norm())


def one_group(case, dtype):
    """The first group's inputs, weights ``[k, d]`` and output gradients; options; the reference's rows."""
    layer, (options,) = case.layer, case.layer.options
    d, k = layer.d_in - (layer.bias is not None), layer.d_out
    if layer.kind == "linear":
        a, g, rows = case.inputs, case.output_gradients, reference.linear_input_rows(case.inputs, False)[0]
    else:
        a, g = case.inputs[:, : layer.weight.shape[1]], case.output_gradients[:, :k]
        kernel, stride, padding, dilation, _ = options
        shape = (k, a.shape[1], *kernel)
        (rows,) = reference.conv2d_input_rows(F.pad(a, padding), shape, stride, 0, dilation, bias=False)
    return a.to(dtype), normal(k, d).to(dtype), g.to(dtype), options, rows


@dtypes
@given(case=layers())
def test_operation_is_the_rows_times_the_weights(dtype, case):
    kind = KINDS[case.layer.kind]
    a, weights, g, options, rows = one_group(case, dtype)
    found = kind.operation(a, weights, options)
    assert found.shape == g.shape and found.dtype == dtype
    channels_last = found.movedim(kind.channel(options), -1)
    close(channels_last.reshape(-1, weights.shape[0]), rows @ weights.double().mT, dtype)


@dtypes
@given(case=layers(), copies=st.integers(0, 2))
def test_transpose_is_the_sum_of_g_times_rows(dtype, case, copies):
    """Further leading axes are summed over."""
    kind = KINDS[case.layer.kind]
    a, weights, g, options, rows = one_group(case, dtype)
    g_rows = g.double().movedim(kind.channel(options), -1).reshape(-1, weights.shape[0])
    if copies:
        a, g = torch.stack([a, 2 * a][:copies]), torch.stack([g, 3 * g][:copies])
    expected = (1, 1, 1 + 2 * 3)[copies] * g_rows.mT @ rows
    close(kind.transpose(a, g, weights.shape[1], options), expected, dtype)


@given(layers(), st.integers(0, 4))
def test_transpose_is_the_adjoint(case, k):
    """For any number of channels ``k``, the one with which factors are touched."""
    kind = KINDS[case.layer.kind]
    a, weights, _, options, _ = one_group(case, torch.float64)
    weights = normal(k + 1, weights.shape[1])
    s, pullback = torch.func.vjp(lambda w: kind.operation(a, w, options), weights)
    g = normal(*s.shape, seed=1)
    close(kind.transpose(a, g, weights.shape[1], options), pullback(g)[0])


@given(layers())
def test_rows_at_hand_are_those_of_the_reference(case):
    kind = KINDS[case.layer.kind]
    a, weights, _, _, rows = one_group(case, torch.float64)
    assert (kind.rows is None) == (case.layer.kind == "conv2d")
    if kind.rows is not None:
        close(kind.rows(a, weights.shape[1]), rows)


SETTINGS = {
    "default": {},
    "stride": {"stride": 2},
    "stride of a pair": {"stride": (2, 3)},
    "padding": {"padding": 2},
    "padding of a pair": {"padding": (0, 2)},
    "tuple of one": {"stride": (2,), "padding": (1,), "dilation": (2,)},
    "lists": {"stride": [2, 1], "padding": [1, 0], "dilation": [1, 2]},
    "same": {"padding": "same"},
    "same, dilated": {"padding": "same", "dilation": (2, 1)},
    "valid": {"padding": "valid", "stride": 2},
    "dilation": {"dilation": 2},
    "everything": {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
}


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 4), (3, 2)], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_spelling_of_a_convolution(kernel, settings, groups):
    """Parsed once, the settings say the same as the call: for each group, without the bias."""
    x, w, b = normal(2, 4, 9, 10), normal(8, 4 // groups, *kernel, seed=1), normal(8, seed=2)
    expected = F.conv2d(x, w, b, groups=groups, **settings)
    call = CONV2D.parse(x, w, b, groups=groups, **settings)
    assert call.input is x and call.weight is w and call.bias is b
    assert CONV2D.groups(call.options) == groups and hash(call.options) is not None
    parts = zip(x.chunk(groups, 1), w.flatten(1).chunk(groups), strict=True)
    found = torch.cat([CONV2D.operation(a, one, call.options) for a, one in parts], 1)
    close(found + b[:, None, None], expected)
    defaults = {"stride": 1, "padding": 0, "dilation": 1}
    positional = [*(defaults | settings).values(), groups]
    assert CONV2D.parse(x, w, b, *positional) == call
    assert CONV2D.parse(input=x, weight=w, groups=groups, **settings) == call._replace(bias=None)


def test_calls_of_linear():
    x, w, b = normal(3, 4), normal(2, 4), normal(2)
    assert LINEAR.parse(x, w, b) == LINEAR.parse(x, weight=w, bias=b) == (x, w, b, ())
    assert LINEAR.parse(input=x, weight=w) == (x, w, None, ())
    assert KIND_OF == {F.linear: LINEAR, F.conv2d: CONV2D}


@given(st.sampled_from([(-1, (5, 3)), (-1, (2, 4, 3)), (-3, (2, 3, 4, 5)), (-3, (3, 2, 2))]), seeds)
def test_bias_is_a_layer_with_the_input_one(axis_and_shape, seed):
    axis, shape = axis_and_shape
    g, b, a = normal(*shape, seed=seed), normal(3, seed=seed), torch.empty(0)
    s, pullback = torch.func.vjp(lambda w: torch.zeros(shape).double() + BIAS.operation(a, w, (axis,)), b[:, None])
    other_axes = [i for i in range(len(shape)) if i - len(shape) != axis]
    assert all(torch.equal(row, b) for row in s.movedim(axis, -1).reshape(-1, 3))
    close(BIAS.transpose(a, g, 1, (axis,)), pullback(g)[0])
    close(BIAS.transpose(a, g, 1, (axis,))[:, 0], g.sum(other_axes))
