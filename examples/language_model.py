"""A transformer that writes Python's reference character by character, trained by three methods.

python -m examples.language_model
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import lrkfac
from examples.common import Metric, Options, Problem, methods
from examples.compare import compare
from examples.text import Params, init_transformer, text_codes, text_windows, transformer

CONTEXT, WIDTH, BLOCKS = 32, 64, 2
EVALUATED = 50  # the loss is the mean over one in so many windows

LEARNING_RATES = {
    "adam": (2e-3, (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)),
    "rank-16": (0.1, (0.03, 0.1, 0.3, 1.0, 3.0)),
}
DAMPING = 0.1  # three times the default, the best of 1e-4, 1e-3, 0.01, 0.1, 0.3
KL_CLIP = 1e-3  # of 1e-3, 3e-3, 1e-2, 1e-1, 1
METHODS = ("adam", "rank-16", "adaptive")


def continuation(params: Params, prompt: str, length: int, seed: int) -> str:
    """Return a text that the model writes after the prompt, a character at a time, drawn from its distribution."""
    generator = torch.Generator().manual_seed(seed)
    _, characters = text_codes()
    codes = [characters.index(character) for character in prompt]
    for _ in range(length):
        logits = transformer(params, torch.tensor([codes[-CONTEXT:]]))[0, -1]
        codes.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
    return "".join(characters[code] for code in codes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    inputs, targets, vocabulary = text_windows(CONTEXT)
    likelihood = lrkfac.categorical()

    def measure(params: Params) -> tuple[float]:
        outputs = transformer(params, inputs[::EVALUATED])
        return (likelihood.negative_log_likelihood(outputs, targets[::EVALUATED]).mean().item(),)

    def init(seed: int) -> dict[str, Tensor]:
        return init_transformer(seed, vocabulary, CONTEXT, WIDTH, BLOCKS)

    everything = methods(LEARNING_RATES, damping=DAMPING, kl_clip=KL_CLIP)
    result = compare(
        Problem(
            name="language_model",
            title=f"Characters of Python's reference, transformer of {BLOCKS} blocks, width {WIDTH}, context {CONTEXT}",
            model=transformer,
            likelihood=likelihood,
            init=init,
            inputs=inputs,
            targets=targets,
            measure=measure,
            metrics=(
                Metric("loss [nats]", "training loss\n[nats per character]", "{:.3f}", ticks=(2, 2.5, 3, 3.5, 4)),
            ),
            examples="windows",
        ),
        {name: everything[name] for name in METHODS},
        (__doc__ or "").splitlines()[0],
        Options(steps=300, batch_size=32, refresh=10),
        arguments,
    )
    for name, runs in result.runs.items():
        text = continuation(runs[0].params, "The statement ", 150, seed=0)
        result.console.print(f"\n[bold]{everything[name].style.label} writes:[/bold]")
        result.console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
