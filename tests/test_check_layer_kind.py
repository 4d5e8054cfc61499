"""``check_layer_kind`` passes kinds that are right and says what is wrong with others."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lrkfac import LayerKind
from lrkfac.testing import check_layer_kind
from tests.core.layers.test_custom import DOUBLE, KINDS, X, each, pairs, patches

ARGUMENTS = {
    "circular": ((X, torch.randn(6, dtype=DOUBLE)), {"power": 2, "b": torch.randn(1, dtype=DOUBLE)}),
    "pairs": ((X, X.cos()), {"w": torch.randn(4, 6, 6, dtype=DOUBLE), "b": torch.randn(4, dtype=DOUBLE)}),
    "patches": ((X.unflatten(1, (1, 6)).repeat(1, 2, 1), torch.randn(2, 4, 3, dtype=DOUBLE)), {}),
}


@each
def test_the_checker_passes_what_is_right(name):
    args, kwargs = ARGUMENTS[name]
    check_layer_kind(KINDS[name], *args, **kwargs)


CONV = lambda a, w: F.conv1d(a, w.unflatten(1, (-1, 3)))  # noqa: E731
CENTRED = {"function": lambda x, w: patches(x - x.mean(0), w), "operation": lambda a, w: CONV(a - a.mean(0), w)}
TANH = {"function": lambda x, w: patches(x, w).tanh(), "operation": lambda a, w: CONV(a, w).tanh()}
SCALED = {"function": lambda x, w: patches(x * w.sum(), w), "parts": lambda x, w: (x * w.sum(), w)}
APART = {
    "function": lambda x, y, w, b: pairs(x, y, w, b) * torch.arange(1, 5),
    "operation": lambda a, w: a @ w.mT * torch.arange(1, 1 + len(w)),
    "parts": lambda x, y, w, b: ((x[:, :, None] * y[:, None, :]).flatten(1), w),
}
WRONG = [
    ("pairs", {"operation": lambda a, w: 2 * a @ w.mT}, "with the weight and the bias"),
    ("pairs", {"operation": lambda a, w: (a @ w.mT).sum(0)}, "the shape of the output"),
    ("pairs", {"operation": lambda a, w: a @ w.mT if len(w) == 4 else a @ w.mT.flip(1)}, "its own row"),
    ("pairs", APART, "operation"),
    ("pairs", {"parts": lambda x, y, w, b: (*KINDS["pairs"].parts(x, y, w, b)[:2], b[:1])}, "bias"),
    ("patches", CENTRED, "each example by itself"),
    ("patches", SCALED, "does not depend on the weight"),
    ("patches", TANH, "linear in W"),
    ("patches", {"parts": lambda x, w: (x, w * 1)}, "one of the arguments"),
    ("pairs", {"channel": -2}, r"channel: the axis -2 of the output, \(5, 4\), holds the 4 rows"),
]


@pytest.mark.parametrize(("name", "changes", "match"), WRONG, ids=[match for _, _, match in WRONG])
def test_the_checker_names_what_is_wrong(name, changes, match):
    args, kwargs = ARGUMENTS[name]
    with pytest.raises(AssertionError, match=match):
        check_layer_kind(replace(KINDS[name], **changes), *args, **kwargs)


def test_a_wrong_channel_is_named_where_lengths_agree():
    kind = LayerKind("square", lambda x, w: x @ w.mT, lambda x, w: x @ w.mT, channel=-2)
    x, w = torch.randn(2, 3, 6, dtype=DOUBLE), torch.randn(3, 6, dtype=DOUBLE)
    check_layer_kind(replace(kind, channel=-1), x, w)
    with pytest.raises(AssertionError, match=r"channel: three times as many .* the axis -2 .*, got \(2, 3, 9\)"):
        check_layer_kind(kind, x, w)


def test_float32_is_refused_rather_than_called_wrong():
    args, kwargs = ARGUMENTS["pairs"]
    with pytest.raises(TypeError, match=r"args: expected float64, .* got torch.float32; call .double\(\)"):
        check_layer_kind(KINDS["pairs"], *args, **{**kwargs, "b": kwargs["b"].float()})
