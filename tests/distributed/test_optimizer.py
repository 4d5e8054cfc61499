"""``LowRankKFAC`` on two processes: a module in ``DistributedDataParallel`` trains as one process does."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lrkfac
from tests.distributed.processes import outcome, run

pytestmark = pytest.mark.slow

X, Y = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()


def trained(net, rank, size):
    """Parameters after steps on batches, and on accumulated and clipped ones; this process has every ``size``-th."""
    optimizer = lrkfac.LowRankKFAC(net, lrkfac.categorical(), X[:2], lr=0.1, rank=3, statistics_every=2)
    x, y = X[rank::size], Y[rank::size]
    torch.manual_seed(3)  # of the targets that are drawn
    for _ in range(6):
        optimizer.step(x, y)
    for _ in range(2):
        for i in range(2):
            optimizer.evaluate(x[i::2], y[i::2], statistics=False)
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def on_a_process():
    rank, size = dist.get_rank(), dist.get_world_size()
    net = nn.parallel.DistributedDataParallel(network())
    params = trained(net, rank, size)
    lrkfac.check_replicas(params, dist.group.WORLD)
    other = network()
    with torch.no_grad():
        other[2].bias[1] += rank
    make = lambda: lrkfac.LowRankKFAC(other, lrkfac.categorical(), X[:2], lr=0.1, group=dist.group.WORLD)  # noqa: E731
    return [p.tolist() for p in params], outcome(make)


def test_a_module_in_ddp_trains_as_one_process(tmp_path):
    alone = trained(network(), 0, 1)
    for params, error in run(on_a_process, 2, tmp_path):
        for p, q in zip(params, alone, strict=True):
            torch.testing.assert_close(torch.tensor(p, dtype=q.dtype), q, rtol=1e-12, atol=1e-12)
        assert "'2.bias' differs: rank 0 has" in error and "rank 1 has" in error
