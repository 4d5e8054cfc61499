"""An autoencoder of handwritten digits, written as a pure function and trained by seven methods.

python -m examples.digits_autoencoder
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrkfac
from examples.common import TRAINING_EXAMPLES, Metric, Options, Problem, digits, methods
from examples.compare import compare

WIDTHS = (64, 128, 64, 32, 8, 32, 64, 128, 64)

# For each method the learning rate and the five that `--grid --seeds 3` chose it from. With K-FAC all from
# 0.03 on are equally good, the clip being active.
KFAC_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
LEARNING_RATES = {
    "sgd": (0.03, (0.005, 0.01, 0.02, 0.03, 0.05)),
    "adam": (5e-3, (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)),
    "kfac": (0.1, KFAC_RATES),
    "rank-1": (0.1, KFAC_RATES),
    "rank-4": (0.1, KFAC_RATES),
    "rank-16": (0.1, KFAC_RATES),
}
DAMPING = 0.03  # of 0.01, 0.03, 0.1, 0.3 with rank 16; in nats squared
KL_CLIP = 1e-3  # of 3e-4, 1e-3, 3e-3, 1e-2, 1e-1; it, not the learning rate, sets the length of most steps
REFRESH = 5  # steps between statistics

Params = list[dict[str, Tensor]]


def init(seed: int) -> Params:
    """Glorot's normal weights and zero biases."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "weight": nn.init.xavier_normal_(torch.empty(d_out, d_in), generator=generator),
            "bias": torch.zeros(d_out),
        }
        for d_in, d_out in itertools.pairwise(WIDTHS)
    ]


def autoencoder(params: Params, pixels: Tensor) -> Tensor:
    """Logits of the pixels, ``[N, 64]``, through a code of eight numbers."""
    x = pixels
    for layer in params[:-1]:
        x = torch.tanh(F.linear(x, layer["weight"], layer["bias"]))
    return F.linear(x, params[-1]["weight"], params[-1]["bias"])


def main() -> None:
    """Run the example."""
    pixels = digits()[0][:TRAINING_EXAMPLES]
    likelihood = lrkfac.bernoulli()

    def measure(params: Params) -> tuple[float]:
        return (likelihood.negative_log_likelihood(autoencoder(params, pixels), pixels).mean().item(),)

    entropy = -(torch.special.xlogy(pixels, pixels) + torch.special.xlogy(1 - pixels, 1 - pixels))
    floor = entropy.sum(dim=1).mean().item()
    loss = Metric(
        "loss [nats]",
        f"training loss [nats per digit]\nlog scale above the data's entropy, {floor:.2f}",
        "{:.3f}",
        floor=floor,
        ticks=(14.4, 14.6, 15, 15.5, 16, 17, 18, 20, 23, 30, 45),
    )
    compare(
        Problem(
            name="digits_autoencoder",
            title=f"Digits autoencoder {'-'.join(map(str, WIDTHS))}",
            model=autoencoder,
            likelihood=likelihood,
            init=init,
            inputs=pixels,
            targets=pixels,
            measure=measure,
            metrics=(loss,),
        ),
        methods(LEARNING_RATES, damping=DAMPING, kl_clip=KL_CLIP),
        (__doc__ or "").splitlines()[0],
        Options(steps=1000, batch_size=256, refresh=REFRESH),
    )


if __name__ == "__main__":
    main()
