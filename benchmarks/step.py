"""Time of a training step of low-rank K-FAC beside a plain functional SGD step, by width.

python -m benchmarks.step
"""

from __future__ import annotations

from functools import partial

from benchmarks.networks import perceptron
from benchmarks.ratio_tables import choice_of, parser_of_ratios, report

MODULE = "benchmarks.step"
LIMIT = 1.15
"""What a step, refreshes included, may cost, in SGD steps."""


def main() -> None:
    """Runs the benchmark."""
    parser = parser_of_ratios(MODULE, __doc__, ranks=(32, 8, 128), repeats=9)
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[1024, 2048, 4096], metavar="D", help="of the hidden layers")
    add("--batch-size", type=int, default=128, metavar="N", help="examples per batch")
    add("--dense-up-to", type=int, default=2048, metavar="D", help="the largest width with dense K-FAC and libraries")
    arguments = parser.parse_args()
    works = [
        (
            width,
            choice_of(arguments, capture=True, dense=not arguments.no_dense and width <= arguments.dense_up_to),
            partial(perceptron, width, arguments.batch_size),
        )
        for width in arguments.widths
    ]
    title = f"Three hidden layers, batch {arguments.batch_size}"
    report(MODULE, title, "width", LIMIT, works, arguments)


if __name__ == "__main__":
    main()
