"""Time of a training step of low-rank K-FAC beside an SGD step, for a ResNet-18, by batch size.

python -m benchmarks.convolutions
"""

from __future__ import annotations

from benchmarks.networks import resnet18
from benchmarks.ratio_tables import by_batch_size

MODULE = "benchmarks.convolutions"
LIMIT = 1.3
"""What a step, refreshes included, may cost, in SGD steps."""


def main() -> None:
    """Runs the benchmark."""
    title = "ResNet-18, images of 32 x 32"
    by_batch_size(MODULE, __doc__, title, LIMIT, resnet18, batch_sizes=(32, 128), dense_up_to=32)


if __name__ == "__main__":
    main()
