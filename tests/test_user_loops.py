"""Whole runs as users write them: adapters with groups, a checkpoint and a part that is thawed; buffers."""

import copy
import io
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import lrkfac
from tests.transforms.test_base import trained


class Adapted(nn.Module):
    """A frozen layer with an update of low rank beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


def test_adapters_with_groups_a_checkpoint_and_a_part_that_is_thawed():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)]
    net = nn.Sequential(nn.Embedding(11, 8), *blocks, nn.Linear(8, 11)).requires_grad_(False)
    net[1][1], net[2][1] = Adapted(net[1][1]), Adapted(net[2][1])
    net[3].requires_grad_(True)
    x = torch.randint(11, (16, 8))
    y = (3 * x + 1) % 11

    def made(net):
        adapters = [p for name, p in net.named_parameters() if name.endswith((".a", ".b"))]
        groups = [
            {"params": adapters, "momentum": 0.85},
            {"params": net[3].parameters(), "lr": 0.02, "weight_decay": 1e-3},
        ]
        optimizer = lrkfac.LowRankKFAC(net, lrkfac.categorical(), x, 0.1, params=groups, rank=4, kl_clip=5e-2)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)

    def train(optimizer, scheduler, steps):
        for _ in range(steps):
            loss = optimizer.step(x, y)
            scheduler.step()
        return loss

    start = copy.deepcopy(net)
    optimizer, scheduler = made(net)
    first, half = train(optimizer, scheduler, 1), train(optimizer, scheduler, 14)
    file, parts = io.BytesIO(), (net, optimizer, scheduler)
    torch.save(([part.state_dict() for part in parts], torch.get_rng_state()), file)
    straight = train(optimizer, scheduler, 8)
    assert max(half, straight) < 0.95 * first

    file.seek(0)
    held, generator = torch.load(file, weights_only=True)
    again = (start, *made(start))
    for part, state in zip(again, held, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(generator)
    assert torch.equal(train(*again[1:], 8), straight)

    kept = again[1].chain_state[0].factors
    again[1].add_param_group({"params": start[2][3].requires_grad_(True).parameters(), "lr": 0.02})
    assert "2.3" in {layer.name for layer in again[1].layers}
    assert all(again[1].chain_state[0].factors[name] is state for name, state in kept.items())
    assert train(*again[1:], 10) < 0.95 * first


def test_buffers_by_functional_call_are_those_of_from_module():
    """A network in eval mode as one's own pure function, with its buffers in a closure or among the inputs."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten(), nn.Linear(16, 3)
    )
    x, y = torch.randn(8, 2, 4, 4), torch.arange(8) % 3
    net(x)
    model, params = lrkfac.from_module(net.eval())
    buffers = dict(net.named_buffers())
    ways = [
        (model, x),
        (lambda p, inputs: functional_call(net, (p, buffers), (inputs,)), x),
        (lambda p, inputs: functional_call(net, (p, inputs[0]), (inputs[1],)), (buffers, x)),
    ]
    found = []
    for function, inputs in ways:
        layers = lrkfac.find_layers(function, params, inputs, strict=True)
        evaluate = partial(lrkfac.evaluator(function, lrkfac.categorical(), layers, "exact"), inputs=inputs, targets=y)
        found.append(trained(lrkfac.low_rank_kfac(layers, 0.1, rank=4), params, evaluate)[-1].params)
    assert all(torch.equal(one[name], x) for one in found[1:] for name, x in found[0].items())
