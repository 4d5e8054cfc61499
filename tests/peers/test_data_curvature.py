"""Gauss-Newton and Hessian matrices and their traces against curvlinops.

Its loss is torch's ``MSELoss``, the mean over examples and ``K`` outputs of the squared error: ``2 / K`` times the
Gaussian one with variance 1.
"""

import pytest
import torch
from torch import nn

import lrkfac
from lrkfac.linalg import trace_estimate
from tests.tensors import close, normal

pytestmark = pytest.mark.peers
LOSSES = {
    "categorical": (lrkfac.categorical(), nn.CrossEntropyLoss(), 1.0),
    "gaussian": (lrkfac.gaussian(), nn.MSELoss(), 2 / 3),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("matrix", ["GGNLinearOperator", "HessianLinearOperator"])
def test_products_and_estimates_agree(name, matrix):
    curvlinops = pytest.importorskip("curvlinops")
    likelihood, loss, factor = LOSSES[name]
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs = normal(6, 4)
    targets = torch.tensor([0, 1, 2, 0, 1, 2]) if name == "categorical" else normal(6, 3, seed=1)
    data = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    theirs = getattr(curvlinops, matrix)(net, loss, list(net.parameters()), data, check_deterministic=False)
    model, params = lrkfac.from_module(net)
    make = lrkfac.curvature.ggn if matrix.startswith("GGN") else lrkfac.curvature.hessian
    ours = make(model, likelihood)(params, data)
    x = normal(ours.dimension, seed=2)
    in_order = [name for name, _ in net.named_parameters()]
    tree = dict(zip(in_order, [part.reshape(params[n].shape) for n, part in _parts(x, params, in_order)], strict=True))
    product = ours.product(tree)
    expected = theirs @ x
    close(factor * torch.cat([product[n].flatten() for n in in_order]), torch.as_tensor(expected), atol=1e-10)
    generator = torch.Generator().manual_seed(0)
    trace = torch.as_tensor(theirs @ torch.eye(ours.dimension).double()).trace() / factor
    found = trace_estimate(ours, 20, generator)
    assert abs(found.value - trace) <= 6 * found.error + 1e-9
    if matrix.startswith("GGN"):  # of at most 18 eigenvalues other than 0, both estimates are exact
        close(found.value, curvlinops.xtrace(theirs, 40) / factor, atol=1e-9)


def _parts(x, params, names):
    return zip(names, x.split([params[n].numel() for n in names]), strict=True)
