"""A network that knows the digits 0 to 4 learns 5 to 9 from few examples, its weights frozen.

It trains either only the last layer, or low-rank adapters beside all layers (LoRA, Hu et al. 2021, arXiv 2106.09685).
A parameter that requires no gradient is a constant of the function: only trained parameters have curvature and state.

python -m examples.fine_tuning
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrkfac
from examples.common import TRAINING_EXAMPLES, Method, Metric, Options, Problem, Style, digits, methods
from examples.compare import compare

WIDTHS = (64, 128, 128, 10)
KNOWN = 5  # the digits below are known
NEW_EXAMPLES = 300  # of the digits above, to learn from
ADAPTER_RANK = 4

LEARNING_RATES = {
    "adam": (3e-2, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "rank-16": (0.1, (0.01, 0.03, 0.1, 0.3, 1.0)),
}
HEAD_RATES = {"adam": 1e-1, "rank-16": 1.0}  # of the same, for the last layer alone
DAMPING = 1e-2  # a third of the default, the best of 1e-2, 0.1, 1
KL_CLIP = 1e-3  # of 1e-3, 1e-2


class Adapted(nn.Module):
    """A frozen linear layer plus ``up(down(x))``, which is zero at first."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def pretrained(pixels: Tensor, labels: Tensor) -> nn.Sequential:
    """Return three linear layers, trained on these digits with nothing to tune, and frozen."""
    torch.manual_seed(0)
    d, hidden, wide, classes = WIDTHS
    net = nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, wide), nn.Tanh(), nn.Linear(wide, classes))
    optimizer = lrkfac.LowRankKFAC(
        net, lrkfac.categorical(), pixels[:1], transformation=lrkfac.adaptive_low_rank_kfac, rank=16, statistics_every=5
    )
    for _ in range(30):
        batch = torch.randint(len(pixels), (256,))
        optimizer.step(pixels[batch], labels[batch])
    return net.requires_grad_(False)


def with_trained_head(net: nn.Sequential, seed: int) -> nn.Module:
    net = copy.deepcopy(net)
    net[-1].requires_grad_(True)
    return net


def with_adapters(net: nn.Sequential, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(Adapted(part, ADAPTER_RANK) if isinstance(part, nn.Linear) else part for part in copy.deepcopy(net))
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    pixels, labels = digits()
    train, test = torch.arange(len(labels)).split([TRAINING_EXAMPLES, len(labels) - TRAINING_EXAMPLES])
    known = train[labels[train] < KNOWN]
    new = train[labels[train] >= KNOWN][:NEW_EXAMPLES]
    test = test[labels[test] >= KNOWN]
    net = pretrained(pixels[known], labels[known])

    def problem(adapt: Callable[[nn.Sequential, int], nn.Module]) -> Problem:
        model, _ = lrkfac.from_module(adapt(net, 0))

        def measure(params: Any) -> tuple[float, float]:
            loss = F.cross_entropy(model(params, pixels[new]), labels[new])
            correct = model(params, pixels[test]).argmax(dim=1) == labels[test]
            return loss.item(), 100 * correct.float().mean().item()

        return Problem(
            name="fine_tuning",
            title=f"Digits {KNOWN} to 9 by a frozen network {'-'.join(map(str, WIDTHS))} that knows the others",
            model=model,
            likelihood=lrkfac.categorical(),
            init=lambda seed: lrkfac.from_module(adapt(net, seed))[1],
            inputs=pixels[new],
            targets=labels[new],
            measure=measure,
            metrics=(
                Metric("loss [nats]", "training loss [nats per digit]", "{:.1e}", logarithmic=True),
                Metric("test accuracy [%]", "test accuracy, new digits [%]", "{:.1f}", ticks=(0, 20, 40, 60, 80, 100)),
            ),
        )

    of_head, of_adapters = problem(with_trained_head), problem(with_adapters)
    for what, one in {"last layer": of_head, f"adapters of rank {ADAPTER_RANK}": of_adapters}.items():
        print(f"{what}: {sum(p.numel() for p in one.init(0).values()):,} numbers are trained")
    tuned = methods(LEARNING_RATES, damping=DAMPING, kl_clip=KL_CLIP)

    def method(name: str, of: Problem, label: str, colour: str, dashes: Any = "-") -> Method:
        rate = HEAD_RATES[name] if of is of_head else tuned[name].learning_rate
        return replace(tuned[name], problem=of, learning_rate=rate, style=Style(label, colour, dashes))

    compare(
        of_adapters,
        {
            "head-adam": method("adam", of_head, "last layer, Adam", "#666666", (0, (5, 1.5, 1, 1.5))),
            "head-rank-16": method("rank-16", of_head, "last layer, K-FAC", "#000000"),
            "adapters-adam": method("adam", of_adapters, "adapters, Adam", "#E69F00", (0, (5, 1.5, 1, 1.5))),
            "adapters-rank-16": method("rank-16", of_adapters, "adapters, K-FAC", "#D55E00"),
            "adapters-adaptive": method("adaptive", of_adapters, "adapters, untuned", "#CC79A7"),
        },
        (__doc__ or "").splitlines()[0],
        Options(steps=100, batch_size=64, refresh=5),
        arguments,
    )


if __name__ == "__main__":
    main()
