"""A classifier of handwritten digits on several processes, with the same results as on one.

torchrun --nproc-per-node=2 -m examples.data_parallel
python -m examples.data_parallel
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lrkfac
from examples.common import digits
from examples.processes import group_of_processes
from examples.report import positive, progress_bar

# So that parts are equal on 2, 3, 4, 5, 6, 8, 10 or 12 processes: with parts of a batch that are not, training is as
# good, but the sampler deals other batches than to one process.
TRAINING_EXAMPLES, BATCH = 1440, 120
LEARNING_RATE = 0.1


class Epoch(NamedTuple):
    """Results of an epoch: mean training loss of its batches, loss of all training examples, test accuracy."""

    running_loss: float
    loss: float
    accuracy: float


def network(seed: int) -> nn.Module:
    """Three linear layers with tanh between them."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))


def train(options: argparse.Namespace, device: torch.device, console: Console) -> tuple[nn.Module, list[Epoch]]:
    """Train on this process' part of each batch; the network is the same on all processes."""
    group = dist.group.WORLD if dist.is_initialized() else None
    rank, size = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
    if BATCH % size:
        raise SystemExit(f"--nproc-per-node: expected a divisor of the batch of {BATCH} examples, got {size}")
    pixels, labels = (x.to(device) for x in digits())
    data = TensorDataset(pixels[:TRAINING_EXAMPLES], labels[:TRAINING_EXAMPLES])
    sampler: DistributedSampler[Tensor] = DistributedSampler(data, size, rank, seed=options.seed)
    loader = DataLoader(data, BATCH // size, sampler=sampler)

    net = network(options.seed).to(device)
    # The one line that differs from training on one process: the group.
    optimizer = lrkfac.LowRankKFAC(
        net, lrkfac.categorical(), pixels[:1], lr=LEARNING_RATE, rank=16, statistics_every=5, group=group,
    )  # fmt: skip
    epochs = []
    with progress_bar(console) as progress:
        bar = progress.add_task("training", total=options.epochs * len(loader), loss="")
        for epoch in range(options.epochs):
            sampler.set_epoch(epoch)
            losses = []
            for inputs, targets in loader:
                losses.append(optimizer.step(inputs, targets))  # of the batch of all processes
                if rank == 0:
                    progress.update(bar, advance=1, loss=f"{losses[-1].item():.3f}", refresh=True)
            epochs.append(Epoch(torch.stack(losses).mean().item(), *measure(net, pixels, labels)))
    return net, epochs


@torch.no_grad()
def measure(net: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[float, float]:
    """Loss in nats of the training examples, and percent of the others that are recognised."""
    outputs = net(pixels)
    loss = F.cross_entropy(outputs[:TRAINING_EXAMPLES], labels[:TRAINING_EXAMPLES])
    correct = outputs.argmax(1)[TRAINING_EXAMPLES:] == labels[TRAINING_EXAMPLES:]
    return loss.item(), 100 * correct.float().mean().item()


def equal_on_all(net: nn.Module) -> bool:
    """Whether all processes have the parameters of the first, bit for bit."""
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    first = flat.clone()
    dist.broadcast(first, src=0)
    differ = (flat != first).any().float()
    dist.all_reduce(differ)
    return not differ.item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    with group_of_processes() as device:
        # All processes print, the others into nothing.
        console = Console(quiet=dist.is_initialized() and dist.get_rank() > 0)
        start = time.perf_counter()
        net, epochs = train(options, device, console)
        seconds = time.perf_counter() - start
        _show(console, epochs)
        if dist.is_initialized():
            same = "equal bit for bit" if equal_on_all(net) else "DIFFERENT"
            console.print(f"parameters of {dist.get_world_size()} processes: {same}", highlight=False)
        console.print(f"{seconds:.1f} seconds", highlight=False)


def _show(console: Console, epochs: Sequence[Epoch]) -> None:
    table = Table(title="digits, three linear layers", title_justify="left", box=SIMPLE)
    for heading in ("epoch", "loss of its batches, nats", "training loss, nats", "test accuracy, %"):
        table.add_column(heading, justify="right")
    for i, epoch in enumerate(epochs, 1):
        table.add_row(str(i), f"{epoch.running_loss:.4f}", f"{epoch.loss:.4f}", f"{epoch.accuracy:.1f}")
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.data_parallel",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=positive, default=10, metavar="N", help="passes through the training set")
    add("--seed", type=int, default=0, metavar="S", help="seed of weights, batches and sampled labels")
    add("--threads", type=positive, default=1, metavar="N", help="CPU threads of each process")
    return parser


if __name__ == "__main__":
    main()
