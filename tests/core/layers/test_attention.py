"""Attention written out equals torch's, which a function mode sees as one call."""

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lrkfac
from lrkfac import evaluator, find_layers, from_module
from lrkfac.core.layers.attention import multi_head_attention
from tests.compiling import traced
from tests.tensors import close, normal

N, T, S, HEADS = 3, 4, 5, 2


def masked(*shape):
    """Bools, never all of a row."""
    return (normal(*shape, seed=1) < 0) & (torch.arange(shape[-1]) > 0)


MASKS = {
    "none": {},
    "bools": {"attn_mask": masked(T, S)},
    "for each head": {"attn_mask": normal(N * HEADS, T, S, seed=2)},
    "keys": {"key_padding_mask": masked(N, S)},
    "keys and numbers": {"key_padding_mask": normal(N, S, seed=3), "attn_mask": normal(T, S, seed=2)},
    "causal and keys": {
        "attn_mask": torch.ones(T, S).triu(1).bool(), "is_causal": True, "key_padding_mask": masked(N, S),
    },
}  # fmt: skip
MODULES = {
    "packed": {},
    "no biases": {"bias": False},
    "separate": {"kdim": 3, "vdim": 6},
    "added keys": {"add_bias_kv": True, "add_zero_attn": True},
    "zero keys": {"add_zero_attn": True, "kdim": 3, "vdim": 6},
}


def equal_with_gradients(args, kwargs):
    results = []
    for function in (F.multi_head_attention_forward, multi_head_attention):
        leaves = optree.tree_map(
            lambda x: x.detach().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x, (args, kwargs)
        )
        torch.manual_seed(0)  # of dropout
        output, weights = function(*leaves[0], **leaves[1])
        total = (output * normal(*output.shape, seed=8)).sum()
        total = total if weights is None else total + (weights * normal(*weights.shape, seed=9)).sum()
        tensors = [x for x in optree.tree_leaves(leaves) if torch.is_tensor(x) and x.requires_grad]
        results.append((output, weights, torch.autograd.grad(total, tensors, allow_unused=True)))
    close(results[1], results[0])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", MODULES)
def test_equals_torchs_with_gradients(kind, mask):
    torch.manual_seed(0)
    net = nn.MultiheadAttention(4, HEADS, dropout=0.5, **MODULES[kind]).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    separate = not net._qkv_same_embed_dim
    inputs = normal(T, N, 4), normal(S, N, net.kdim, seed=4), normal(S, N, net.vdim, seed=5)
    weights = {f"{x}_proj_weight": getattr(net, f"{x}_proj_weight") for x in "qkv"} if separate else {}
    static = {"static_k": normal(N * HEADS, S, 2, seed=6), "static_v": normal(N * HEADS, S, 2, seed=7)}
    ways = [(*weights, {}) for weights in ((False, True), (True, True), (True, False))]  # none, mean, of heads
    if net.bias_k is None and mask in ("none", "keys"):
        ways += [(True, False, {"static_k": static["static_k"]}), (False, True, static)]
    for need, average, fixed in ways:
        args = (
            *inputs, 4, HEADS, net.in_proj_weight, net.in_proj_bias, net.bias_k, net.bias_v, net.add_zero_attn, 0.5,
            net.out_proj.weight, net.out_proj.bias, False,
        )  # fmt: skip
        options = {"need_weights": need, "average_attn_weights": average, "use_separate_proj_weight": separate}
        equal_with_gradients(args, {**options, **weights, **fixed, **MASKS[mask]})


def test_without_batch():
    net = nn.MultiheadAttention(4, HEADS).double()
    x, mask, out = normal(T, 4), torch.tensor([False, True, False, False]), net.out_proj
    args = (x, x, x, 4, HEADS, net.in_proj_weight, net.in_proj_bias, None, None, False, 0.5, out.weight, out.bias)
    for need_weights in (False, True):
        equal_with_gradients(args, {"key_padding_mask": mask, "need_weights": need_weights})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, HEADS, batch_first=True), nn.Linear(4, 3)

    def forward(self, x, mask=None):
        return self.head(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0].mean(1))


def test_projections_are_layers_and_errors_are_torchs():
    model, params = from_module(Net().double())
    layers = find_layers(model, params, normal(N, T, 4), strict=True)
    expected = [*(f"attention.in_proj_weight.chunk(3)[{i}]" for i in range(3)), "attention.out_proj", "head"]
    assert [layer.name for layer in layers] == expected and all(layer.by_example for layer in layers)
    with pytest.raises(RuntimeError, match="2D attn_mask"):
        find_layers(model, params, (normal(N, T, 4), torch.zeros(1, T)))


@pytest.mark.slow
def test_compiled_the_same_as_eager():
    model, params = from_module(Net().double())
    x, y = normal(N, T, 4), torch.tensor([0, 1, 2])
    evaluate = evaluator(model, lrkfac.categorical(), find_layers(model, params, x), "exact")
    expected, result = evaluate(params, x, y), traced(evaluate)(params, x, y)
    torch.testing.assert_close((result.grads, result.statistics), (expected.grads, expected.statistics))
