"""Products of the linear algebra are float32 whatever is allowed for those of the model."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lrkfac
from lrkfac.core.base.dtypes import full_precision

BACKENDS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


class Precisions(TorchDispatchMode):
    """Notes how precise each product may be."""

    def __init__(self):
        super().__init__()
        self.noted = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            self.noted.add(tuple(backend.fp32_precision for backend in BACKENDS))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["high", "medium"])
def allowed(request):
    torch.set_float32_matmul_precision(request.param)
    yield tuple(backend.fp32_precision for backend in BACKENDS)
    torch.set_float32_matmul_precision("highest")
    for backend in BACKENDS:
        backend.fp32_precision = "none"  # as torch starts


def test_refresh_and_application_are_exact_and_the_model_is_not(allowed):
    net = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40))
    model, params = lrkfac.from_module(net)
    x, y = torch.randn(64, 40), torch.randint(40, (64,))
    layers = lrkfac.find_layers(model, params, x)
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers)
    tx = lrkfac.precondition_by_fisher(layers, rank=4)
    state = tx.init(params)
    for statistics in (True, False):
        with Precisions() as of_model:
            evaluation = evaluate(params, x, y, statistics=statistics)
        with Precisions() as of_update:
            _, state = tx.update(evaluation.grads, state, params, evaluation=evaluation)
        assert of_model.noted == {allowed} and of_update.noted == {("ieee", "ieee")}
    assert tuple(backend.fp32_precision for backend in BACKENDS) == allowed


def test_what_was_allowed_is_restored_after_an_error(allowed):
    with pytest.raises(KeyError), full_precision(torch.ones(1)):
        raise KeyError
    assert tuple(backend.fp32_precision for backend in BACKENDS) == allowed
