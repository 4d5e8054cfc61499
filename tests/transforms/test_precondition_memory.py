"""Numbers in the state of ``precondition_by_fisher``."""

import optree
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lrkfac
from lrkfac import precondition_by_fisher


@settings(max_examples=10)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40), st.booleans())
def test_memory_of_a_linear_layer(d_in, d_out, rank, bias):
    params = {"w": torch.ones(d_out, d_in), **({"b": torch.ones(d_out)} if bias else {})}
    check_memory(lambda p, x: F.linear(x, p["w"], p.get("b")), params, torch.ones(3, d_in), rank)


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 3), st.integers(1, 20))
def test_memory_of_a_convolution(d_in, d_out, groups, rank):
    params = {"w": torch.ones(groups * d_out, d_in, 3, 2), "b": torch.ones(groups * d_out)}
    model = lambda p, x: F.conv2d(x, p["w"], p["b"], groups=groups)  # noqa: E731
    check_memory(model, params, torch.ones(2, groups * d_in, 4, 5), rank)


def check_memory(model, params, inputs, rank):
    """At most ``(r + 2)(d_in + d_out + 2)`` numbers for a pair of factors, as many for their inverses: what
    tensors hold, and what the storages behind them do."""
    layers = lrkfac.find_layers(model, params, inputs)
    tx = precondition_by_fisher(layers, rank=rank)
    e = lrkfac.evaluator(model, lrkfac.gaussian(), layers, "empirical")(params, inputs, model(params, inputs))
    start = tx.init(params)
    for state in (start, tx.update(e.grads, start, params, evaluation=e)[1]):
        for layer in layers:
            bound = layer.groups * (rank + 2) * (layer.d_in + layer.d_out + 2)
            for part in (state.factors, state.inverses):
                leaves = optree.tree_leaves(part[layer.name])
                assert sum(x.numel() for x in leaves) <= bound
                storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in leaves}
                # float32, and the counts of batches in int64
                assert sum(storages.values()) <= 4 * bound + 8 * layer.groups
