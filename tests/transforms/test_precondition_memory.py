"""Numbers in the state of ``precondition_by_fisher``."""

import optree
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lrkfac
from lrkfac import precondition_by_fisher


@settings(max_examples=15)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 3), st.integers(1, 40), st.booleans())
def test_numbers_of_a_layer(d_in, d_out, groups, rank, bias):
    """At most ``(r + 2)(d_in + d_out + 2)`` for a pair of factors, as many for their inverses: what tensors hold,
    and what the storages behind them do."""
    params = {"w": torch.ones(groups * d_out, d_in, 3), **({"b": torch.ones(groups * d_out)} if bias else {})}
    model = lambda p, x: F.conv1d(x, p["w"], p.get("b"), groups=groups)  # noqa: E731
    inputs = torch.ones(2, groups * d_in, 4)
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
