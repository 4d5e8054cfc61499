"""What is covered, what is refused, and why: the table of the documentation, which the tests run row by row.

``python -m tests.coverage_table > docs/coverage.md`` writes the page.
"""

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import hessian, vmap
from torch.utils.checkpoint import checkpoint

import lrkfac


class Row(NamedTuple):
    """A model and what becomes of it.

    ``make`` returns model, parameters and inputs. ``outcome`` is "covered": all parameters belong to layers whose
    examples are known; "without examples": they belong to layers, but structures made of single examples are refused;
    "not covered" or "refused", with ``words`` of the reason. ``note`` says what else ``print(layers)`` says;
    ``jacobian`` whether ``find_layers`` is called with ``uncovered="jacobian"``.
    """

    what: str
    outcome: str
    why: str
    make: Callable[[], tuple[Any, Any, Any]]
    words: str = ""
    note: str = ""
    jacobian: bool = False


W = {"w": torch.ones(3, 4), "o": torch.ones(2, 3)}
X, SEQUENCE = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.randn(5, 7, 4)
NUMBERS = torch.randint(6, (5, 7), generator=torch.Generator().manual_seed(1))


def of(model, params=W, inputs=X):
    return lambda: (model, params, inputs)


def module(net, inputs=X):
    return lambda: (*lrkfac.from_module(net()), inputs)


def head(p, h):
    return F.linear(torch.tanh(h), p["o"])


@dataclass
class Batch:
    x: torch.Tensor


class Opaque:
    def __init__(self, x):
        self.x = x


class Sign(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


def hooked():
    net = nn.Linear(4, 2)
    net.weight.register_hook(lambda g: 2 * g)
    return net


def watched():
    net = nn.Linear(4, 2)
    net.register_full_backward_hook(lambda *_: None)
    return net


def folded(p, x):
    rows = F.linear(x.transpose(0, 1).flatten(0, 1), p["w"])
    return head(p, rows).unflatten(0, (-1, len(x))).mean(0)


def laplacian(p, x):
    """Of a network, point by point."""
    return vmap(lambda point: hessian(network, argnums=1)(p, point).diagonal().sum())(x)[:, None]


def network(p, x):
    return F.linear(torch.tanh(F.linear(x, p["w"])), p["o"][:1])[..., 0]


GROUPS = {
    "Layers": [
        Row("products in any spelling, with or without bias", "covered", "operations count, not modules",
            of(lambda p, x: torch.tanh(x @ p["w"].T + p["b"]) @ p["o"].t(), {**W, "b": torch.ones(3)})),
        Row("an embedding tied to the output layer", "covered", "one layer of two uses",
            of(lambda p, n: F.embedding(n, p) @ p.T, torch.ones(6, 3), NUMBERS)),
        Row("attention", "covered", "packed projections are three layers",
            module(lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), SEQUENCE)),
        Row("a batch of weights, as in `einsum(\"nhi,hio->nho\", x, w)`", "not covered",
            "a common index is also in the result",
            of(lambda p, x: torch.einsum("nhi,hio->nho", x[:, None], p["w"][None].mT)[:, 0] @ p["o"].T),
            "only summed indices in common"),
        Row("the same, one product after another: `x[:, h] @ w[h]`", "covered", "each part of the weight is a layer",
            of(lambda p, x: torch.cat([x @ p["w"][h].T for h in range(2)], 1) @ p["o"].T,
                {"w": torch.ones(2, 3, 4), "o": torch.ones(2, 6)})),
        Row("a weight that is computed from parameters", "not covered",
            "the block of `w` differs from that of its exponential",
            of(lambda p, x: head(p, F.linear(x, p["w"].exp()))), "used by torch.Tensor.exp"),
    ],
    "Where the examples are": [
        Row("time in front: `[T, N, d]`", "covered", "found from the rows that move with the examples",
            of(lambda p, x: head(p, F.linear(x.transpose(0, 1), p["w"])).mean(0), W, SEQUENCE)),
        Row("positions folded into the batch, before or behind", "covered", "the same",
            of(folded, W, SEQUENCE)),
        Row("pairs in one call, one after another or interleaved", "covered", "the same",
            of(lambda p, x: head(p, F.linear(torch.cat([x, -x]), p["w"])[: len(x)]))),
        Row("a row that all examples share, `[1, d]`", "covered", "it counts once for each example",
            of(lambda p, x: head(p, F.linear(torch.arange(4.0)[None], p["w"]) * x[:, :3]))),
        Row("rows that all examples share, `[T, d]`", "not covered", "no axis separates their gradients",
            of(lambda p, x: head(p, x @ F.linear(torch.eye(4), p["w"]))),
            "what all examples share"),
        Row("rows in another order, such as the last example first", "without examples",
            "`kronecker(...)` treats all rows alike; order rows by example for other structures",
            of(lambda p, x: head(p, F.linear(x.flip(0), p["w"]).flip(0)))),
        Row("a scale or an embedding on such rows", "not covered", "their blocks are made of single examples",
            of(lambda p, x: head(p, F.linear((x.flip(0) * p["s"]).flip(0), p["w"])), {**W, "s": torch.ones(4)}),
            "which rows belong to which example"),
    ],
    "Examples that depend on each other": [
        Row("BatchNorm in training mode", "covered",
            "`\"exact\"` takes random signs; `full()` and `layer_wise()` are refused",
            module(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))),
            note="outputs of one example depend on others"),
        Row("contrastive outputs, `h @ h.T`", "covered", "the same",
            of(lambda p, x: F.linear(x, p) @ F.linear(x, p).T, torch.ones(3, 4)),
            note="outputs of one example depend on others"),
        Row("outputs flattened over positions, `logits.view(-1, V)`", "covered", "`\"exact\"` takes random signs",
            of(lambda p, x: head(p, F.linear(x, p["w"]).cumsum(1)).flatten(0, 1), W, SEQUENCE),
            note="several places of the leading axis"),
    ],
    "Numbers": [
        Row("real parameters on complex activations", "covered", "rows of real and of imaginary parts",
            of(lambda p, x: head(p, (torch.fft.rfft(x) * p["s"] + 1j).abs()), {"o": W["o"], "s": torch.ones(3)})),
        Row("complex parameters", "refused", "store them as real ones",
            of(lambda p, x: (x * p).abs(), torch.ones(4, dtype=torch.complex64)), "complex"),
    ],
    "Containers": [
        Row("mappings, dataclasses, and types registered in torch's pytree", "covered", "as inputs and as outputs",
            of(lambda p, b: {"logits": head(p, F.linear(b["batch"].x, p["w"]))}, W, UserDict(batch=Batch(X)))),
        Row("other objects that hold tensors", "refused", "their batches could not be found or split",
            of(lambda p, b: head(p, F.linear(b.x, p["w"])), W, Opaque(X)), "Opaque"),
    ],
    "Features of autograd": [
        Row("`torch.utils.checkpoint`, both kinds", "covered", "nothing is recomputed, so it saves no memory",
            of(lambda p, x: checkpoint(lambda x: head(p, F.linear(x, p["w"])), x, use_reentrant=False))),
        Row("custom `torch.autograd.Function`", "covered", "only the layers outside it",
            of(lambda p, x: F.linear(Sign.apply(F.linear(x, p["w"])), p["o"]))),
        Row("backward hooks of modules", "refused", "they would also see the passes of the statistics",
            module(watched), "backward hooks"),
        Row("hooks of parameters", "refused", "they would be ignored", module(hooked), "has a hook"),
        Row("`spectral_norm` in training mode", "refused", "each pass takes a step of its power iteration",
            module(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2))), "spectral_norm"),
        Row("active dropout", "refused", "hidden random numbers",
            module(lambda: nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5))), "draws hidden random numbers"),
        Row("`.item()`, `if x > 0`", "refused", "another path may have other layers",
            of(lambda p, x: head(p, F.linear(x, p["w"])) * x.sum().item()), "depend on the values"),
    ],
    "Derivatives within the model": [
        Row("`torch.func.vmap` over the examples", "covered", "the mapped axis is the batch",
            of(lambda p, x: vmap(lambda one: head(p, F.linear(one, p["w"])))(x))),
        Row("`laplacian(network)`, `derivatives(network, …)`", "covered", "value and derivatives are rows of one layer",
            of(lrkfac.laplacian(lambda p, x: head(p, F.linear(x, p["w"]))))),
        Row("the same for a function of one point, inside `torch.func.vmap`", "covered", "the same",
            of(vmap(lrkfac.laplacian(lambda p, x: head(p, F.linear(x, p["w"]))), (None, 0)))),
        Row("`grad`, `jvp`, `hessian` of a network inside the model", "not covered",
            "plain gradients and `fallback=`; Fisher products are exact",
            of(laplacian), "hessian|derivative|jvp|grad"),
        Row('the same, with `find_layers(..., uncovered="jacobian")`', "covered",
            "each parameter is a layer; its rows are gradients of single examples",
            of(laplacian), jacobian=True),
    ],
}  # fmt: skip


KINDS = [
    "## Kinds of layers",
    "",
    "Layers are found by the operations that use the parameters, not by the code around them.",
    "",
    "| kind | operations |",
    "|---|---|",
    "| `linear` | `F.linear`, `x @ w`, `w @ x`, `matmul`, `mm`, `addmm`, with a matrix `w`. `einsum` of one weight "
    "and one input that have only summed indices in common. Views such as `w.T`, `reshape`, `chunk` and "
    "slices are allowed, and so is a following `+ b` |",
    "| `conv1d` … `conv3d`, `conv_transpose1d` … | convolutions with stride, padding, dilation and groups |",
    "| `embedding` | embeddings, also tied to the output layer; the factor of the vocabulary is diagonal |",
    "| `scale`, `shift` | BatchNorm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm; parameters that are mul"
    "tiplied, added or expanded over the batch |",
    '| `bias` | a bias separate from its weight, with `find_layers(..., bias="separate")` |',
    '| `jacobian` | a whole parameter that no operation covers, with `find_layers(..., uncovered="jacobian")`: its '
    "rows are gradients of single examples |",
    "| custom | any operation linear in its weight, with `find_layers(..., kinds=[LayerKind(...)])` |",
    "",
    "The packed projection of `nn.MultiheadAttention` is three layers, q, k and v. A weight that is used several times",
    "in one forward pass (recurrence, sharing) is one layer with several uses.",
]
"""What the page says of the kinds of layers, before the models."""


def page() -> str:
    """Return the page of the documentation."""
    lines = [
        "# What is covered, what is refused, and why",
        "",
        "`find_layers` runs the model on tensors without values, and then on a few examples that change places. The",
        "tests run the model of each row below (`tests/coverage_table.py`).",
        "",
        "* *Covered*: all parameters belong to layers whose examples are known.",
        '* *Without examples*: `kronecker(...)` with `treatment="expand"` is right. Structures that need gradients',
        "  of single examples are errors.",
        "* *Not covered*: these parameters get plain gradients, or the update of `fallback=`. `print(layers)` shows",
        '  the reason. With `find_layers(..., uncovered="jacobian")` each is a layer, if examples are independent.',
        "* *Refused*: an error gives the reason before anything runs.",
    ]
    lines += ["", *KINDS]
    for title, rows in GROUPS.items():
        lines += ["", f"## {title}", "", "| model | outcome | |", "|---|---|---|"]
        lines += [f"| {row.what} | {row.outcome} | {row.why} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
