"""``add_decayed_weights`` equals the formula."""

import pytest
import torch

from lrkfac import add_decayed_weights
from lrkfac.testing import check_transformation
from tests import reference_optimizers
from tests.transforms.test_base import close, flat, nested


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_laws(dtype):
    check_transformation(add_decayed_weights(0.1), nested(dtype))


@pytest.mark.parametrize("weight_decay", [0, 1e-3, 2.0])
def test_equals_the_reference(weight_decay):
    params, grads = nested(), nested(seed=1)
    found, state = add_decayed_weights(weight_decay).update(grads, (), params)
    close(found, reference_optimizers.decayed_weights_added(flat(grads), flat(params), weight_decay))
    assert state == ()


def test_updates_keep_their_dtype():
    found, _ = add_decayed_weights(0.1).update(nested(torch.bfloat16), (), nested(torch.float32, seed=1))
    assert {u.dtype for u in flat(found).values()} == {torch.bfloat16}


@pytest.mark.parametrize("weight_decay", [-0.1, float("inf"), float("nan")])
def test_weight_decay_is_checked(weight_decay):
    with pytest.raises(ValueError, match="weight_decay: expected a finite number"):
        add_decayed_weights(weight_decay)


def test_params_are_needed_and_must_fit():
    with pytest.raises(ValueError, match=r"add_decayed_weights: params is missing; call update\("):
        add_decayed_weights(0.1).update(nested(), ())
    with pytest.raises(ValueError, match=r"add_decayed_weights: .*\['w'\]"):
        add_decayed_weights(0.1).update(nested(), (), {k: p for k, p in nested().items() if k != "w"})
