"""Layers with real parameters and complex activations, as ``tests/reference_kinds.py`` describes them."""

from functools import partial

import torch
import torch.nn.functional as F

import lrkfac
from tests.reference_kinds import Operation

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=GENERATOR, dtype=dtype)


def parts(z):
    """Real and imaginary parts along an axis after the batch: real outputs with the same derivatives."""
    return torch.view_as_real(z.resolve_conj()).movedim(-1, 1)


mixed = lrkfac.LayerKind("mix", lambda z, w, b: z @ w.mT.to(z.dtype) + b, lambda z, w: z @ w.mT.to(z.dtype))
filtered = lrkfac.LayerKind(
    "filter",
    lambda x, w: torch.fft.rfft(x) * w,
    lambda x, w: (torch.fft.rfft(x)[..., None, :] * w).mT,
    weight_axis=None,
)
spectral = lrkfac.LayerKind(
    "spectral",
    lambda x, w: torch.fft.rfft(x) @ w.mT.to(torch.complex128),
    lambda x, w: torch.fft.rfft(x) @ w.mT.to(torch.complex128),
)
correlated = lrkfac.LayerKind(
    "correlated",
    lambda z, w: F.conv1d(z, w.to(z.dtype)),
    lambda z, w: F.conv1d(z, w.reshape(len(w), -1, 2).to(z.dtype)),
    channel=-2,
)
KINDS = (mixed, filtered, spectral, correlated)
C = partial(normal, dtype=torch.complex128)


def one_matrix(p):
    return p["w"].flatten(1)[None]


def of_units(p):
    return p["w"].reshape(-1, 1)


def of_rows(p):
    return p["w"].flatten(1)


GAINS = {
    "gain": ("scale", lambda p, x: parts(torch.fft.rfft(x) * p["w"] + 1j), normal(3), normal(4, 2, 5)),
    "gain of channels": ("scale", lambda p, z: parts(p["w"] * z), normal(2, 1), C(4, 2, 3)),
    "gain of conjugates": ("scale", lambda p, z: parts(torch.mul(z.conj(), p["w"]).conj()), normal(3), C(4, 3)),
    "offset": ("shift", lambda p, z: parts(z + p["w"]), normal(2, 3), C(4, 2, 3)),
    "offset of all": ("shift", lambda p, z: parts(torch.add(p["w"], z)), normal(1), C(4, 3)),
    "normalisation": ("scale", lambda p, z: parts(F.rms_norm(z, (3,), p["w"])), normal(3), C(4, 2, 3)),
    "twice": ("scale", lambda p, z: torch.cat([parts(z * p["w"]), (z.real * p["w"])[:, None]], 1), normal(3), C(4, 3)),
}
OPERATIONS = {
    **{name: Operation(kind, f, {"w": w}, x, [of_units]) for name, (kind, f, w, x) in GAINS.items()},
    "outer": Operation(
        "linear",
        lambda p, z: parts(torch.einsum("nt,d->ntd", z, p["w"])),
        {"w": normal(3)},
        C(4, 2),
        [of_units],
        [lambda p: p["w"].reshape(1, -1, 1)],
    ),
    "mix": Operation(
        "mix",
        lambda p, z: parts(mixed(z, p["w"], p["b"])),
        {"w": normal(2, 3), "b": normal(2)},
        C(4, 2, 3),
        [of_rows, lambda p: p["b"][:, None]],
        [one_matrix, lambda p: p["b"][None, :, None]],
    ),
    "filter": Operation(
        "filter",
        lambda p, x: parts(filtered(x, p["w"]))[..., None],
        {"w": normal(3)},
        normal(4, 5),
        [lambda p: p["w"][None]],
        [lambda p: p["w"][None, None]],
    ),
    "spectral": Operation(
        "spectral", lambda p, x: parts(spectral(x, p["w"])), {"w": normal(2, 3)}, normal(4, 5), [of_rows], [one_matrix]
    ),
    "correlated": Operation(
        "correlated",
        lambda p, z: parts(correlated(z, p["w"])),
        {"w": normal(2, 3, 2)},
        C(4, 3, 3),
        [of_rows],
        [one_matrix],
        channel=-2,
    ),
}
