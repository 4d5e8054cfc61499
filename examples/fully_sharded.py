"""A classifier of handwritten digits with parameters sharded over several processes, compared with one process.

torchrun --nproc-per-node=2 -m examples.fully_sharded
python -m examples.fully_sharded
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.distributed as dist
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import lrkfac
from examples.common import digits
from examples.processes import group_of_processes
from examples.report import positive, progress_bar

BATCH = 240
LEARNING_RATE = 0.1


def network(seed: int) -> nn.Module:
    """Three linear layers with tanh between them."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))


def train(
    options: argparse.Namespace, device: torch.device, mesh: DeviceMesh | None, console: Console
) -> tuple[nn.Module, list[float]]:
    """Train on all processes of a mesh, or alone; return the network and the loss of each step."""
    net = network(options.seed).double().to(device)
    if mesh is not None:
        for part in net:
            if isinstance(part, nn.Linear):
                fully_shard(part, mesh=mesh)
        fully_shard(net, mesh=mesh)
    pixels, labels = (x.to(device) for x in digits())
    pixels = pixels.double()
    # Nothing here but the group knows that parameters are sharded.
    optimizer = lrkfac.LowRankKFAC(
        net, lrkfac.categorical(), pixels[:1], lr=LEARNING_RATE, rank=16, statistics_every=5,
        estimator="exact", group=mesh,
    )  # fmt: skip
    rank, size = (0, 1) if mesh is None else (mesh.get_rank(), mesh.size())
    generator, losses = torch.Generator().manual_seed(options.seed), []
    with progress_bar(console) as progress:
        bar = progress.add_task("alone" if mesh is None else "sharded", total=options.steps, loss="")
        for _ in range(options.steps):
            batch = torch.randint(len(pixels), (BATCH,), generator=generator)[rank::size]
            losses.append(optimizer.step(pixels[batch], labels[batch]).item())
            progress.update(bar, advance=1, loss=f"{losses[-1]:.3f}", refresh=True)
    return net, losses


def local_bytes(net: nn.Module) -> int:
    """Return the bytes of the parameters that lie in this process."""
    parts: list[Tensor] = [getattr(p, "_local_tensor", p) for p in net.state_dict().values()]
    return sum(p.numel() * p.element_size() for p in parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    with group_of_processes(of_one=True) as device:
        console = Console(quiet=dist.get_rank() > 0)  # all processes print, the others into nothing
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        sharded, losses = train(options, device, mesh, console)
        alone, losses_alone = train(options, device, None, console)
        _show(console, losses, losses_alone)
        whole = lrkfac.unshard(sharded.state_dict())
        difference = max((whole[name] - x).abs().max().item() for name, x in alone.state_dict().items())
        console.print(f"largest difference of parameters: {difference:.0e}", highlight=False)
        part, all_of_them = local_bytes(sharded), local_bytes(alone)
        console.print(f"bytes of parameters in a process: {part}, alone: {all_of_them}", highlight=False)


def _show(console: Console, losses: list[float], losses_alone: list[float]) -> None:
    table = Table(title="digits, three linear layers, float64", title_justify="left", box=SIMPLE)
    for heading in ("step", "loss, sharded [nats]", "loss, one process [nats]", "difference"):
        table.add_column(heading, justify="right")
    last = len(losses) - 1
    for step in sorted({*range(0, len(losses), max(1, len(losses) // 5)), last}):
        one, other = losses[step], losses_alone[step]
        table.add_row(str(step), f"{one:.6f}", f"{other:.6f}", f"{abs(one - other):.0e}")
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.fully_sharded",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=positive, default=50, metavar="N", help="training steps")
    add("--seed", type=int, default=0, metavar="S", help="seed of weights and batches")
    add("--threads", type=positive, default=1, metavar="N", help="CPU threads of each process")
    return parser


if __name__ == "__main__":
    main()
