"""Trainings of modules under ``fully_shard`` on parts of batches, and of the same modules alone on whole batches."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import lrkfac
from lrkfac.core.base.processes import counted
from lrkfac.core.base.sharding import local_parts
from tests.distributed.processes import outcome

STEPS, EVERY = 10, 3
RANK = 2


class Unused(nn.Module):
    """One of its parameters is in no output, so that its gradient is zero; another is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(5, 5), nn.Linear(5, 3)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shared(self.shared(x).tanh()).tanh())


def uneven() -> nn.Module:
    """Three rows, seven, and one: on four processes, some have none of a weight."""
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 7), nn.LayerNorm(7), nn.Linear(7, 1), nn.Linear(1, 3))


def frozen() -> nn.Module:
    """With parameters that are not trained, and with buffers."""
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    net[0].requires_grad_(False)
    net[5].bias.requires_grad_(False)
    return net.eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {"uneven": uneven, "frozen": frozen, "unused": Unused}


def batches(group: Any) -> list[tuple[Tensor, Tensor]]:
    """The part of this process of each batch, of unequal sizes; all of it where there is no group."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS, 9, 5, dtype=torch.float64, generator=generator)
    targets = torch.randint(3, (STEPS, 9), generator=generator)
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    return list(zip(inputs[:, rank::size], targets[:, rank::size], strict=True))


def network(name: str, mesh: Any) -> nn.Module:
    """The same on each process; under ``fully_shard`` where there is a mesh, some of its parts and the whole."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = NETWORKS[name]().double()
    if mesh is not None:
        fully_shard(list(net.children())[-1], mesh=mesh)
        fully_shard(net, mesh=mesh)
    return net


def adaptive(layers: lrkfac.Layers) -> lrkfac.GradientTransformation:
    return lrkfac.adaptive_low_rank_kfac(layers, rank=RANK, dense_up_to=0)


def low_rank(layers: lrkfac.Layers) -> lrkfac.GradientTransformation:
    return lrkfac.low_rank_kfac(layers, 0.1, rank=RANK, weight_decay=0.01)


def by_functions(
    net: nn.Module, group: Any, make: Callable[[lrkfac.Layers], lrkfac.GradientTransformation]
) -> tuple[list[Tensor], Any]:
    """Losses, and the module with its parameters at the end."""
    model, params = lrkfac.from_module(net)
    layers = lrkfac.find_layers(model, lrkfac.unshard(params), batches(group)[0][0])
    evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, "exact", group=group)
    tx, losses = make(layers), []
    state = tx.init(lrkfac.unshard(params))
    for step, (inputs, targets) in enumerate(batches(group)):
        whole = lrkfac.unshard(params)
        evaluation = evaluate(whole, inputs, targets, step % EVERY == 0)
        updates, state = tx.update(evaluation.grads, state, whole, evaluation=evaluation)
        params = lrkfac.apply_updates(params, updates)
        losses.append(evaluation.loss)
    net.load_state_dict({**dict(net.state_dict()), **params})
    return losses, net


def by_optimizer(net: nn.Module, group: Any, style: str) -> tuple[list[Tensor], nn.Module]:
    """The same with the ``torch.optim`` class; after each step comes a pass without gradients, as a validation has."""
    is_understood = style == "step" and any(getattr(p, "placements", ()) == (Shard(0),) for p in net.parameters())
    optimizer = lrkfac.LowRankKFAC(
        net, lrkfac.categorical(), batches(group)[0][0], lr=0.05, rank=RANK, statistics_every=EVERY, estimator="exact",
        group=None if is_understood else group,
    )  # fmt: skip
    losses = []
    for inputs, targets in batches(group):
        if style == "step":
            losses.append(optimizer.step(inputs, targets))
        else:
            optimizer.evaluate(inputs, targets)
            if style == "accumulate":
                optimizer.evaluate(inputs + 1, targets)
            trained = [p for p in net.parameters() if p.grad is not None]
            total = torch.nn.utils.clip_grad_norm_(trained, 0.1)
            losses += [optimizer.step(), lrkfac.unshard(total)]
        with torch.no_grad():
            losses.append(net(batches(None)[0][0]).sum())
    optimizer.load_state_dict(optimizer.state_dict())
    losses.append(optimizer.step(*batches(group)[0]))
    return losses, net


WAYS: dict[str, Callable[[nn.Module, Any], tuple[list[Tensor], nn.Module]]] = {
    "low rank": lambda net, group: by_functions(net, group, low_rank),
    "adaptive": lambda net, group: by_functions(net, group, adaptive),
    **{
        style: lambda net, group, style=style: by_optimizer(net, group, style)
        for style in ("step", "evaluate", "accumulate")
    },
}


# Network, axes of the mesh, and way of training, by the number of processes.
CASES = {
    2: (
        ("uneven", 1, "low rank"), ("uneven", 1, "adaptive"), ("uneven", 1, "accumulate"), ("frozen", 1, "low rank"),
        ("frozen", 1, "evaluate"), ("unused", 1, "step"),
    ),
    4: (("uneven", 1, "low rank"), ("unused", 1, "evaluate"), ("uneven", 2, "step")),
}  # fmt: skip


def every_training(folder: Path) -> dict[str, Any]:
    """Losses, outputs and parameters at the end, sharded and not, and the lengths of the parts of this process."""
    world, results = dist.get_world_size(), {}
    meshes = {
        1: dist.init_device_mesh("cpu", (world,)),
        2: dist.init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("copies", "parts")),
    }
    for i, (name, axes, way) in enumerate(CASES[world]):
        found = {"sharded": training(name, meshes[axes], dist.group.WORLD, way)}
        if i % world == dist.get_rank():
            found["alone"] = training(name, None, None, way)
        results[f"{name}, {axes} axes, {way}"] = found
    net, optimizer = with_optimizer(meshes[1])
    calls = []
    for inputs, targets in batches(dist.group.WORLD)[:2]:
        with counted() as made:
            optimizer.step(inputs, targets)
        calls.append([operation for operation, _ in made])
    resumed, other = with_optimizer(meshes[1])
    resume(net, optimizer, resumed, other, folder)
    losses = [one.step(inputs, targets) for one in (optimizer, other)]
    pairs = zip(local_parts(list(net.parameters())), local_parts(list(resumed.parameters())), strict=True)
    return {
        "trainings": results,
        "lengths": [len(x) for x in local_parts(list(net.parameters()))],
        "calls": calls,
        "resumed": torch.equal(*losses) and all(torch.equal(p, q) for p, q in pairs),
        "gathered": gathered_as_cut(meshes),
        "refused": outcome(lambda: with_optimizer(meshes[2], None))
        + outcome(lambda: with_optimizer(meshes[2], dist.new_subgroups(2)[0]))
        if world == 4
        else "",
    }


def with_optimizer(mesh: Any, group: Any = None) -> tuple[nn.Module, lrkfac.LowRankKFAC]:
    net, inputs = network("uneven", mesh), batches(dist.group.WORLD)[0][0]
    options = {"lr": 0.05, "rank": RANK, "estimator": "exact", "group": group}
    return net, lrkfac.LowRankKFAC(net, lrkfac.categorical(), inputs, **options)


def resume(net: nn.Module, optimizer: Any, resumed: nn.Module, other: Any, folder: Path) -> None:
    """Save module and optimizer as ``torch.distributed.checkpoint`` does, and load both into others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own
        checkpoint.save(dict(zip("mo", get_state_dict(net, optimizer), strict=True)), checkpoint_id=folder)
        states = dict(zip("mo", get_state_dict(resumed, other), strict=True))
        checkpoint.load(states, checkpoint_id=folder)
        set_state_dict(resumed, other, model_state_dict=states["m"], optim_state_dict=states["o"])


def training(name: str, mesh: Any, group: Any, way: str) -> dict[str, Tensor]:
    losses, net = WAYS[way](network(name, mesh), group)
    with torch.no_grad():
        outputs = net(batches(None)[0][0])
    params = lrkfac.unshard({n: p.detach() for n, p in net.state_dict().items()})
    return {"losses": torch.stack(losses), "outputs": outputs, **params}


def gathered_as_cut(meshes: dict[int, Any]) -> bool:
    """Whether tensors that are cut in any way are gathered to what they were, beside tensors that are not cut."""
    matrix, row = torch.arange(35.0).reshape(7, 5), torch.arange(3)
    one, two = meshes[1], meshes[2]
    cuts = [(one, [Shard(0)]), (one, [Shard(1)]), (one, [Replicate()]), (two, [Replicate(), Shard(0)])]
    cuts += [(two, [Shard(0), Replicate()]), (two, [Shard(0), Shard(1)]), (two, [Shard(1), Replicate()])]
    trees = [{f"{i}": distribute_tensor(matrix, mesh, cut) for i, (mesh, cut) in enumerate(cuts)}, row, matrix]
    trees += [distribute_tensor(row, one, [Shard(0)]), None, distribute_tensor(matrix.double(), one, [Shard(0)])]
    whole = optree.tree_leaves(lrkfac.unshard(trees))
    same = [matrix] * len(cuts) + [row, matrix, row, matrix.double()]
    return all(type(x) is Tensor and torch.equal(x, y) for x, y in zip(whole, same, strict=True))
