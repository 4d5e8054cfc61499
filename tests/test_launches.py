"""What a step costs a GPU beside its arithmetic: kernels that it starts, and waits of the host, counted on the CPU."""

import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

import lrkfac
from tests.dispatch import Launches

CHAINS = {
    "low rank": lambda layers: lrkfac.low_rank_kfac(layers, 0.1, rank=32),
    "dense": lambda layers: lrkfac.kfac(layers, 0.1),
    "adaptive": lambda layers: lrkfac.adaptive_low_rank_kfac(layers, rank=32, dense_up_to=0),
    "spectral": lambda layers: lrkfac.spectral_kfac(layers, 0.01, rank=32),
    "spectral, no rate": lambda layers: lrkfac.spectral_kfac(layers, rank=32),
}
# Of a plain step and of a refresh: of the former, none may wait. A refresh looks at one decomposition
# of small matrices, those of all layers; inverses wait for nothing.
KERNELS = {
    "low rank": (80, 369), "dense": (66, 226), "adaptive": (237, 763), "spectral": (111, 375),
    "spectral, no rate": (332, 700),
}  # fmt: skip
WAITS = {"low rank": 1, "dense": 0, "adaptive": 1, "spectral": 1, "spectral, no rate": 1}


@pytest.fixture
def values_unknown(monkeypatch):
    """As on a GPU, whose values nobody looks at."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("lrkfac.") and hasattr(module, "has_values"):
            monkeypatch.setattr(module, "has_values", lambda x: False)


def launches(chain, statistics, widths=(64, 64, 64, 64, 64)):
    """Of the third or fourth step of four layers."""
    torch.manual_seed(0)
    net = nn.Sequential(*[part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.Tanh())][:-1])
    model, params = lrkfac.from_module(net)
    x, y = torch.randn(32, widths[0]), torch.randint(widths[-1], (32,))
    layers = lrkfac.find_layers(model, params, x)
    evaluate, tx = lrkfac.evaluator(model, lrkfac.categorical(), layers), CHAINS[chain](layers)
    state = tx.init(params)
    for taken in (True, False, statistics):
        with Launches() as counted:
            evaluation = evaluate(params, x, y, statistics=taken)
            updates, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
            params = lrkfac.apply_updates(params, updates)
    return counted


@pytest.mark.parametrize("chain", CHAINS)
def test_a_plain_step_waits_for_nothing(chain, values_unknown):
    counted = launches(chain, statistics=False)
    assert not counted.waits
    assert sum(counted.kernels.values()) <= KERNELS[chain][0]


@pytest.mark.parametrize("chain", CHAINS)
def test_a_refresh_waits_for_one_small_decomposition_alone(chain, values_unknown):
    counted = launches(chain, statistics=True)
    assert set(counted.waits) <= {"_linalg_eigh"} and sum(counted.waits.values()) <= WAITS[chain]
    assert sum(counted.kernels.values()) <= KERNELS[chain][1]


def test_layers_of_all_shapes_wait_once(values_unknown):
    assert launches("low rank", True, (48, 64, 56, 64, 40)).waits == {"_linalg_eigh": 1}


def test_waits_are_seen():
    with Launches() as counted:
        x = torch.ones(3)
        bool(x.sum() > 0)
        torch.linalg.cholesky(torch.eye(3))
        assert x[x > 0].shape == (3,)
    assert counted.waits == {"_local_scalar_dense": 1, "_linalg_check_errors": 1, "index": 1}
