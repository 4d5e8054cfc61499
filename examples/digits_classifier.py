"""A classifier of handwritten digits, an unmodified nn.Module trained by seven methods.

python -m examples.digits_classifier
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import lrkfac
from examples.common import TRAINING_EXAMPLES, Metric, Options, Problem, digits, methods
from examples.compare import compare

WIDTHS = (64, 256, 256, 10)

# For each method the learning rate and the five that `--grid --seeds 3` chose it from. Where several are
# equally good within the noise of three seeds (dense and rank 16, the clip being active), the smallest.
KFAC_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
LEARNING_RATES = {
    "sgd": (0.5, (0.1, 0.2, 0.3, 0.5, 0.7)),
    "adam": (1e-2, (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)),
    "kfac": (0.1, KFAC_RATES),
    "rank-1": (0.01, KFAC_RATES),
    "rank-4": (0.1, KFAC_RATES),
    "rank-16": (0.1, KFAC_RATES),
}
DAMPING = 0.01  # a third of the default, the best of 0.001, 0.01, 0.1 with rank 16; in nats squared
KL_CLIP = 1e-3  # of 1e-3, 1e-2, 1e-1, 1
REFRESH = 5  # steps between statistics


def network(seed: int) -> nn.Module:
    """Three linear layers with tanh between them."""
    torch.manual_seed(seed)
    d, hidden, wide, classes = WIDTHS
    return nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, wide), nn.Tanh(), nn.Linear(wide, classes))


def main() -> None:
    """Run the example."""
    model, _ = lrkfac.from_module(network(seed=0))
    pixels, labels = digits()
    train_pixels, test_pixels = pixels.split([TRAINING_EXAMPLES, len(pixels) - TRAINING_EXAMPLES])
    train_labels, test_labels = labels.split([TRAINING_EXAMPLES, len(labels) - TRAINING_EXAMPLES])

    def measure(params: dict[str, torch.Tensor]) -> tuple[float, float]:
        loss = F.cross_entropy(model(params, train_pixels), train_labels)
        correct = model(params, test_pixels).argmax(dim=1) == test_labels
        return loss.item(), 100 * correct.float().mean().item()

    compare(
        Problem(
            name="digits_classifier",
            title=f"Digits classifier {'-'.join(map(str, WIDTHS))}",
            model=model,
            likelihood=lrkfac.categorical(),
            init=lambda seed: lrkfac.from_module(network(seed))[1],
            inputs=train_pixels,
            targets=train_labels,
            measure=measure,
            metrics=(
                Metric("loss [nats]", "training loss [nats per digit]", "{:.1e}", logarithmic=True),
                Metric("test accuracy [%]", "test accuracy [%]", "{:.1f}", ticks=(70, 75, 80, 85, 90, 95)),
            ),
        ),
        methods(LEARNING_RATES, damping=DAMPING, kl_clip=KL_CLIP),
        (__doc__ or "").splitlines()[0],
        Options(steps=200, batch_size=256, refresh=REFRESH),
    )


if __name__ == "__main__":
    main()
