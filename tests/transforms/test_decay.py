"""``add_decayed_weights`` equals the formula."""

import pytest
import torch

from lrkfac import add_decayed_weights
from tests import reference_optimizers
from tests.transforms.test_base import close, flat, nested


@pytest.mark.parametrize("weight_decay", [0, 1e-3, 2.0])
def test_equals_the_reference(weight_decay):
    params, grads = nested(), nested(seed=1)
    found, state = add_decayed_weights(weight_decay).update(grads, (), params)
    close(found, reference_optimizers.decayed_weights_added(flat(grads), flat(params), weight_decay))
    assert state == ()


def test_updates_keep_their_dtype():
    found, _ = add_decayed_weights(0.1).update(nested(torch.bfloat16), (), nested(torch.float32, seed=1))
    assert {u.dtype for u in flat(found).values()} == {torch.bfloat16}
