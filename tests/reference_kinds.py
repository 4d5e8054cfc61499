"""Float64 references for one layer of every kind, in plain torch: the Fisher matrix and the Kronecker factors of a
small network, for every estimator. Never imports lrkfac.

The network is ``s = operation(x)``, then ``h = tanh(tanh(s) · fixed)`` ``[N, 4]``, then the logits ``h · headᵀ`` of
three classes. A layer's matrix ``M`` ``[groups, d_out, d_in]`` is any arrangement of its parameters in which ``s`` is
linear row by row, ``s_o = Σ_i M_oi a_i``: the rows ``a`` are then derivatives of ``s`` with respect to ``M``, by
autograd alone.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jacrev, vjp, vmap

from tests.reference import kronecker_preconditioned, output_hessian_root

Params = dict[str, Tensor]
Arrangement = Callable[[Params], Tensor]
CLASSES, HIDDEN = 3, 4


class Operation(NamedTuple):
    """A layer of one kind.

    ``matrices`` are those of its layers (two, where the bias is one of its own), ``None`` for kinds without factors;
    ``units`` the same as ``[units, entries]``, one row for each block of ``unit_wise``. ``channel`` is the axis of the
    channels in ``s``; ``one_hot`` whether ``a`` is.
    """

    kind: str
    apply: Callable[[Params, Tensor], Tensor]
    params: Params
    inputs: Tensor
    units: list[Arrangement]
    matrices: list[Arrangement] | None = None
    channel: int = -1
    one_hot: bool = False


def operations() -> dict[str, Operation]:
    """All kinds, with and without groups and joint biases."""
    generator, found = torch.Generator().manual_seed(0), {}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def add(name, kind, apply, shapes, inputs, *matrices, **options) -> None:
        units = [lambda p, m=m: m(p).flatten(0, 1) for m in matrices]
        params = {k: normal(*shape) for k, shape in shapes.items()}
        found[name] = Operation(kind, apply, params, normal(*inputs), units, list(matrices), **options)

    def joint(groups: int, transposed: bool = False) -> Arrangement:
        def matrix(p: Params) -> Tensor:
            w = p["w"].transpose(0, 1) if transposed else p["w"]
            m = w.reshape(groups, w.shape[0] // groups, -1)
            return torch.cat([m, p["b"].reshape(groups, -1, 1)], -1) if "b" in p else m

        return matrix

    def linear(p: Params, x: Tensor) -> Tensor:
        return F.linear(x, p["w"], p.get("b"))

    add("linear", "linear", linear, {"w": (3, 4)}, (4, 2, 4), joint(1))
    add("linear, bias", "linear", linear, {"w": (3, 4), "b": (3,)}, (4, 2, 4), joint(1))
    flat = lambda p, x: linear(p, x.flatten(0, 1)).unflatten(0, x.shape[:2])  # noqa: E731
    add("linear, batch and positions flattened", "linear", flat, {"w": (3, 4)}, (4, 2, 4), joint(1))
    parts = (lambda p: p["w"][None], lambda p: p["b"][None, :, None])
    add("bias", "linear", linear, {"w": (3, 4), "b": (3,)}, (4, 2, 4), *parts)
    tokens, table = torch.randint(5, (4, 3), generator=generator), {"w": normal(5, 3)}
    units, matrices = [lambda p: p["w"]], [lambda p: p["w"].mT[None]]
    embedding = lambda p, x: F.embedding(x, p["w"])  # noqa: E731
    found["embedding"] = Operation("embedding", embedding, table, tokens, units, matrices, one_hot=True)
    norm, units = lambda p, x: F.layer_norm(x, (3,), p["w"], p["b"]), [lambda p: torch.stack([p["w"], p["b"]], -1)]
    found["scale"] = Operation("scale", norm, {"w": normal(3), "b": normal(3)}, normal(4, 2, 3), units)
    shift, units = lambda p, x: x + p["w"], [lambda p: p["w"].reshape(-1, 1)]
    found["shift"] = Operation("shift", shift, {"w": normal(2, 3)}, normal(4, 2, 3), units)
    copied = lambda p, x: x + p["w"].clone()  # noqa: E731  # which is no layer, but for all it does
    add("jacobian", "jacobian", copied, {"w": (3,)}, (4, 3), lambda p: p["w"].reshape(1, -1, 1))
    for axes in (1, 2, 3):
        kernel, size, names = (2, 1, 2)[:axes], (3, 2, 2)[:axes], (f"conv{axes}d", f"conv_transpose{axes}d")
        run = lambda p, x, name=names[0]: getattr(F, name)(x, p["w"], p["b"], stride=2, padding=1)  # noqa: E731
        add(names[0], names[0], run, {"w": (3, 2, *kernel), "b": (3,)}, (4, 2, *size), joint(1), channel=1)
        run = lambda p, x, name=names[1]: getattr(F, name)(x, p["w"], p["b"])  # noqa: E731
        add(names[1], names[1], run, {"w": (2, 3, *kernel), "b": (3,)}, (4, 2, *size), joint(1, True), channel=1)
    grouped = lambda p, x: F.conv1d(x, p["w"], groups=2)  # noqa: E731
    add("conv1d, groups", "conv1d", grouped, {"w": (4, 1, 2)}, (4, 2, 3), joint(2), channel=1)
    return found


def fixed(operation: Operation) -> Tensor:
    """The projection from ``s`` to the hidden units."""
    size = operation.apply(operation.params, operation.inputs)[0].numel()
    return torch.arange(size * HIDDEN, dtype=torch.float64).square().sin().reshape(size, HIDDEN) / math.sqrt(size / 2)


def with_head(operation: Operation) -> Params:
    """The parameters of the network."""
    head = torch.randn(CLASSES, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {**operation.params, "head": head}


def network(operation: Operation, params: Params, inputs: Tensor, probe: Tensor | float = 0.0) -> Tensor:
    """The logits ``[N, 3]``; the probe is added to ``s``."""
    return F.linear(hidden(operation, params, inputs, probe), params["head"])


def hidden(operation: Operation, params: Params, inputs: Tensor, probe: Tensor | float = 0.0) -> Tensor:
    """The inputs of the head, ``[N, 4]``."""
    s = operation.apply(params, inputs) + probe
    return torch.tanh(torch.tanh(s).flatten(1) @ fixed(operation).to(s))


def cotangents(outputs: Tensor, labels: Tensor | None) -> Tensor:
    """Derivatives of the terms at labels ``[k, N]``; without them, the columns of the Hessian's root; over √k and √N.

    Returns [k, N, 3], whose products add up to the mean over terms (and samples).
    """
    if labels is None:
        return output_hessian_root("categorical", outputs).permute(2, 0, 1) / math.sqrt(len(outputs))
    return (outputs.softmax(-1) - F.one_hot(labels, CLASSES)) / math.sqrt(labels.numel())


def fisher_matrix(operation: Operation, params: Params, cotangent: Tensor) -> Tensor:
    """``Σ z zᵀ`` over the gradients ``z`` of single examples, in the order of the dictionary: [P, P]."""
    jacobian = jacrev(lambda p: network(operation, p, operation.inputs))(params)
    flat = torch.cat([jacobian[name].flatten(2) for name in params], -1)
    z = torch.einsum("knc,ncp->knp", cotangent, flat).flatten(0, 1)
    return z.mT @ z


def input_rows(operation: Operation, params: Params, matrix: Arrangement) -> Tensor:
    """``a`` of each example and position: [groups, N, positions, d_in]."""
    groups = matrix(params).shape[0]

    def first_channels(params: Params) -> Tensor:
        s = operation.apply(params, operation.inputs).movedim(operation.channel, -1)
        return s.reshape(len(s), -1, groups, s.shape[-1] // groups)[..., 0]

    jacobian = jacrev(first_channels)(params)
    arranged = vmap(vmap(vmap(matrix)))({k: jacobian[k] for k in params})
    return torch.stack([arranged[:, :, g, g, 0] for g in range(groups)])


def output_rows(operation: Operation, params: Params, cotangent: Tensor, groups: int) -> Tensor:
    """``g`` of each cotangent, example and position: [groups, k, N, positions, d_out]."""
    probe = torch.zeros_like(operation.apply(params, operation.inputs))
    _, back = vjp(lambda probe: network(operation, params, operation.inputs, probe), probe)
    g = torch.stack([back(c)[0] for c in cotangent]).movedim(operation.channel % probe.ndim + 1, -1)
    return g.reshape(*g.shape[:2], -1, groups, g.shape[-1] // groups).movedim(3, 0)


def moments(a: Tensor, g: Tensor | None, d_out: int) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of each group; ``B = I`` without gradients."""
    a = a.flatten(1, 2)
    A = a.mT @ a / a.shape[1]
    if g is None:
        return A, torch.eye(d_out, dtype=a.dtype).expand(len(a), d_out, d_out)
    g = g.flatten(1, 3)
    return A, g.mT @ g


def factors(
    operation: Operation, params: Params, cotangent: Tensor | None, matrix: Arrangement, reduce: bool = False
) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of a layer of the operation; a bias has none for imaginary parts, which do not depend on it."""
    groups, d_out, d_in = matrix(params).shape
    a = input_rows(operation, {name: p for name, p in params.items() if name != "head"}, matrix)
    g = None if cotangent is None else output_rows(operation, params, cotangent, groups)
    if d_in == 1 and "b" in params:
        used = a.abs().amax((0, 1, 3)) > 0
        a, g = a[:, :, used], None if g is None else g[:, :, :, used]
    if reduce:
        a, g = a.mean(2, keepdim=True), None if g is None else g.sum(3, keepdim=True)
    return moments(a, g, d_out)


def head_factors(operation: Operation, params: Params, cotangent: Tensor | None) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of the head, whose output gradients are the cotangents."""
    a = hidden(operation, params, operation.inputs)[None, :, None]
    return moments(a, None if cotangent is None else cotangent[None, :, :, None], CLASSES)


def held(factor: Tensor, structure: str) -> Tensor:
    """What a structure holds of a factor: its diagonal, or at full rank all of it."""
    return torch.diag_embed(factor.diagonal(dim1=-2, dim2=-1)) if structure == "diagonal" else factor


def preconditioned(places: Tensor, gradient: Tensor, A: Tensor, B: Tensor, damping: float) -> Tensor:
    """The flat gradient, natural at the places ``[groups, d_out, d_in]`` of a layer."""
    natural = gradient.clone()
    natural[places] = kronecker_preconditioned(gradient[places], A, B, damping)
    return natural
