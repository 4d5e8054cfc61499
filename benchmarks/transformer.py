"""Time of a training step of low-rank K-FAC beside an SGD step, for a GPT-style transformer, by batch size.

python -m benchmarks.transformer
"""

from __future__ import annotations

from benchmarks.networks import gpt
from benchmarks.ratio_tables import by_batch_size

MODULE = "benchmarks.transformer"
LIMIT = 1.3
"""What a step, refreshes included, may cost, in SGD steps."""


def main() -> None:
    """Runs the benchmark."""
    title = "GPT-style transformer, 6 layers, width 384, context 128"
    by_batch_size(MODULE, __doc__, title, LIMIT, gpt, batch_sizes=(16, 128), dense_up_to=16)


if __name__ == "__main__":
    main()
