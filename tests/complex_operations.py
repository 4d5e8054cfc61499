"""Layers with real parameters and complex activations, as ``tests/reference_kinds.py`` describes them."""

from functools import partial

import torch
import torch.nn.functional as F

import lrkfac
from tests.reference_kinds import Operation

GENERATOR = torch.Generator().manual_seed(0)
KINDS = mixed, filtered, spectral, correlated = (
    lrkfac.LayerKind("mix", lambda z, w, b: z @ w.mT.to(z.dtype) + b, lambda z, w: z @ w.mT.to(z.dtype)),
    lrkfac.LayerKind(
        "filter",
        lambda x, w: torch.fft.rfft(x) * w,
        lambda x, w: (torch.fft.rfft(x)[..., None, :] * w).mT,
        weight_axis=None,
    ),
    lrkfac.LayerKind("spectral", *[lambda x, w: torch.fft.rfft(x) @ w.mT.to(torch.complex128)] * 2),
    lrkfac.LayerKind(
        "correlated",
        lambda z, w: F.conv1d(z, w.to(z.dtype)),
        lambda z, w: F.conv1d(z, w.reshape(len(w), -1, 2).to(z.dtype)),
        channel=-2,
    ),
)


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=GENERATOR, dtype=dtype)


C = partial(normal, dtype=torch.complex128)


def parts(z):
    """Real and imaginary parts along an axis after the batch: real outputs with the same derivatives."""
    return torch.view_as_real(z.resolve_conj()).movedim(-1, 1)


def of_units(p):
    return p["w"].reshape(-1, 1)


def of_column(p):
    return p["w"][None, :, None]


def of(kind, function, inputs, units=of_units, matrices=(), channel=-1, **shapes):
    """An operation whose outputs are the parts of those of the function, with parameters of these shapes."""
    params = {name: normal(*shape) for name, shape in shapes.items()}
    units = [units, lambda p: p["b"][:, None]][: len(params)]
    apply = lambda p, x: parts(function(x, *[p[name] for name in shapes]))  # noqa: E731
    return Operation(kind, apply, params, inputs, units, matrices or None, channel)


def of_one_matrix(kind, function, inputs, channel=-1, **shapes):
    matrices = [lambda p: p["w"].flatten(1)[None], lambda p: p["b"][None, :, None]][: len(shapes)]
    return of(kind, function, inputs, lambda p: p["w"].flatten(1), matrices, channel, **shapes)


OPERATIONS = {
    "gain": of("scale", lambda x, w: torch.fft.rfft(x) * w + 1j, normal(4, 2, 5), w=(3,)),
    "gain of channels": of("scale", lambda z, w: w * z, C(4, 2, 3), w=(2, 1)),
    "gain of conjugates": of("scale", lambda z, w: torch.mul(z.conj(), w).conj(), C(4, 3), w=(3,)),
    "offset": of("shift", lambda z, w: z + w, C(4, 2, 3), w=(2, 3)),
    "offset of all": of("shift", lambda z, w: torch.add(w, z), C(4, 3), w=(1,)),
    "normalisation": of("scale", lambda z, w: F.rms_norm(z, (3,), w), C(4, 2, 3), w=(3,)),
    "twice": of("scale", lambda z, w: torch.cat([z * w, (z.real * w).to(z.dtype)], 1), C(4, 3), w=(3,)),
    "outer": of("linear", lambda z, w: torch.einsum("nt,d->ntd", z, w), C(4, 2), matrices=[of_column], w=(3,)),
    "mix": of_one_matrix("mix", mixed, C(4, 2, 3), w=(2, 3), b=(2,)),
    "filter": of(
        "filter",
        lambda x, w: filtered(x, w)[..., None],
        normal(4, 5),
        lambda p: p["w"][None],
        [lambda p: p["w"][None, None]],
        w=(3,),
    ),
    "spectral": of_one_matrix("spectral", spectral, normal(4, 5), w=(2, 3)),
    "correlated": of_one_matrix("correlated", correlated, C(4, 3, 3), -2, w=(2, 3, 2)),
}
