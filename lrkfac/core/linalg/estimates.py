"""Traces and diagonals of matrices that are known only by their products, from random vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from lrkfac.core.base.arguments import check_choice, check_integer
from lrkfac.core.base.flat import unflattened
from lrkfac.core.base.types import Tree
from lrkfac.core.linalg.actions import Action, SymmetricMap, is_vector
from lrkfac.core.linalg.bases import orthonormal
from lrkfac.core.linalg.probes import probes_of


class Estimate(NamedTuple):
    """The result of ``trace_estimate`` and ``diagonal_estimate``.

    Attributes:
        value: The estimate: ``[]`` of a trace, a vector ``[d]`` or a tree of a diagonal.
        error: Its standard error as the spread of the vectors tells, like ``value``.
        products: Number of products, int64 ``[]``.
    """

    value: Tree
    error: Tree
    products: Tensor


def trace_estimate(
    operator: SymmetricMap,
    samples: int,
    generator: Generator | None = None,
    noise: Tree | None = None,
    like: Tree | None = None,
    method: str = "xtrace",
) -> Estimate:
    """Return an unbiased estimate of the trace of a symmetric matrix.

    * ``"xtrace"``: ``2 * samples`` products. Each vector in turn samples the part outside the image of the
      others; the length of this part is scaled to the mean (Epperly, Tropp & Webber 2024, arXiv 2301.07825). It is best
      where eigenvalues decay.
    * ``"hutch++"``: ``3 * samples`` products: a third for the image, a third within it, a third for the rest (Meyer,
      Musco, Musco & Woodruff 2021, arXiv 2010.09649); ``2 * samples`` vectors.
    * ``"hutchinson"``: ``samples`` products, the mean of ``vᵀ M v`` (Hutchinson 1989).

    Args:
        operator: The matrix: a function, or an operator with ``matvec`` or ``product``.
        samples: As above; at least 2, and at most ``d`` but for ``"hutchinson"``.
        generator: Draws the vectors, normal; either it or ``noise``.
        noise: Vectors of normal numbers: ``[d, k]``, or a tree of leaves ``[k, ...]``, with ``k = samples``, or
            ``2 * samples`` for ``"hutch++"``.
        like: A vector ``[d]`` or tree of the shapes and dtypes that the operator takes. Needed with ``generator`` where
            the operator is a function.
        method: As above.

    Returns:
        An ``Estimate``: ``value``, ``error`` and the number of ``products``.

    Raises:
        ValueError: If shapes do not fit, a number or name is out of range, or not exactly one of ``generator`` and
            ``noise`` is given.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Diagonal, trace_estimate
        >>> M = Diagonal(0.5 ** torch.arange(100.0))
        >>> found = trace_estimate(M, 10, generator=torch.Generator().manual_seed(0))
        >>> abs(float(found.value) - 2) < 0.01, int(found.products)
        (True, 20)
    """
    check_choice(method, "method", ("xtrace", "hutch++", "hutchinson"))
    times, vectors = _vectors(operator, samples, generator, noise, like, method)[:2]
    if method == "hutchinson":
        each, products = torch.linalg.vecdot(vectors, times(vectors), dim=0), samples
    elif method == "hutch++":
        each, products = _hutch_plus_plus(times, vectors), 3 * samples
    else:
        each, products = _xtrace(times, vectors), 2 * samples
    return Estimate(each.mean(), each.std() / samples**0.5, _number(products, each))


def diagonal_estimate(
    operator: SymmetricMap,
    samples: int,
    generator: Generator | None = None,
    noise: Tree | None = None,
    like: Tree | None = None,
    method: str = "xdiag",
) -> Estimate:
    """Return an unbiased estimate of the diagonal of a symmetric matrix.

    * ``"xdiag"``: ``2 * samples`` products: the diagonal within the image of all vectors but one, and of the rest by
      that one, for each in turn (Epperly, Tropp & Webber 2024, arXiv 2301.07825).
    * ``"hutchinson"``: ``samples`` products, the mean of ``v ∘ M v`` (Bekas, Kokiopoulou & Saad 2007).

    Args:
        operator: The matrix: a function, or an operator with ``matvec`` or ``product``.
        samples: As above; at least 2, and at most ``d`` for ``"xdiag"``.
        generator: Draws the vectors; either it or ``noise``. They are taken by their signs.
        noise: Vectors whose signs are random: ``[d, samples]``, or a tree of leaves ``[samples, ...]``.
        like: A vector ``[d]`` or tree of the shapes and dtypes that the operator takes. Needed with ``generator`` where
            the operator is a function.
        method: As above.

    Returns:
        An ``Estimate``: ``value`` and ``error``, vectors ``[d]`` or trees, and the number of ``products``.

    Raises:
        ValueError: If shapes do not fit, a number or name is out of range, or not exactly one of ``generator`` and
            ``noise`` is given.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import Dense, diagonal_estimate
        >>> M = Dense(torch.ones(50, 50))
        >>> found = diagonal_estimate(M, 5, generator=torch.Generator().manual_seed(0))
        >>> found.value[:3].round(decimals=3), int(found.products)
        (tensor([1., 1., 1.]), 10)
    """
    check_choice(method, "method", ("xdiag", "hutchinson"))
    times, vectors, like = _vectors(operator, samples, generator, noise, like, method)
    signs = torch.where(vectors < 0, -1.0, 1.0).to(vectors.dtype)
    if method == "hutchinson":
        each, products = signs * times(signs), samples
    else:
        each, products = _xdiag(times, signs), 2 * samples
    value, error = each.mean(dim=1), each.std(dim=1) / samples**0.5
    if not is_vector(like):
        value, error = unflattened(value, like), unflattened(error, like)
    return Estimate(value, error, _number(products, each))


def _vectors(
    operator: SymmetricMap,
    samples: int,
    generator: Generator | None,
    noise: Tree | None,
    like: Tree | None,
    method: str,
) -> tuple[Action, Tensor, Tree]:
    check_integer(samples, "samples", 2)
    times, vectors, like = probes_of(operator, samples * (2 if method == "hutch++" else 1), generator, noise, like)
    if method != "hutchinson" and samples > vectors.shape[0]:
        raise ValueError(f"samples: expected at most {vectors.shape[0]}, the dimension, got {samples}")
    return times, vectors, like


def _number(value: int, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=torch.int64, device=like.device)


def _hutch_plus_plus(times: Action, vectors: Tensor) -> Tensor:
    """Return an estimate of each of half the vectors."""
    first, second = vectors.chunk(2, dim=1)
    basis = orthonormal(times(first))
    rest = second - basis @ (basis.mT @ second)
    within = torch.linalg.vecdot(basis, times(basis), dim=0).sum()
    return within + torch.linalg.vecdot(rest, times(rest), dim=0)


def _without_one(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis ``Q`` of ``k`` images, and unit columns ``S``, ``[k, k]``.

    ``Q sᵢ`` is the direction of ``Q`` that the images without number ``i`` do not span. Of images that are dependent
    the directions are arbitrary where they may be.
    """
    basis, triangle = torch.linalg.qr(images)
    diagonal = triangle.diagonal()
    largest = diagonal.abs().amax()
    smallest = torch.finfo(images.dtype).eps * torch.where(largest > 0, largest, 1)
    raised = torch.where(diagonal < 0, -1.0, 1.0) * (smallest - diagonal.abs()).clamp(min=0)
    identity = torch.eye(triangle.shape[0], dtype=images.dtype, device=images.device)
    inverse = torch.linalg.solve_triangular((triangle + torch.diag(raised)).mT, identity, upper=False)
    return basis, inverse / torch.linalg.vector_norm(inverse, dim=0)


def _xtrace(times: Action, vectors: Tensor) -> Tensor:
    """Return the estimate of each vector, which all others have not seen.

    With ``P = Q (I - s sᵀ) Qᵀ`` for the others it is ``tr P M P + c vᵀ (I - P) M (I - P) v``, where ``c`` makes
    ``(I - P) v`` as long as it is in the mean.
    """
    (d, k), images = vectors.shape, times(vectors)
    basis, spared = _without_one(images)
    of_basis = times(basis)
    within, coefficients = basis.mT @ of_basis, basis.mT @ vectors
    along = torch.linalg.vecdot(spared, coefficients, dim=0)
    x = coefficients - spared * along  # of P v, in the basis
    inner = within.diagonal().sum() - torch.linalg.vecdot(spared, within @ spared, dim=0)
    rest = torch.linalg.vecdot(vectors, images, dim=0) - 2 * torch.linalg.vecdot(of_basis.mT @ vectors, x, dim=0)
    rest = rest + torch.linalg.vecdot(x, within @ x, dim=0)
    square = vectors.square().sum(dim=0) - x.square().sum(dim=0)
    scale = (d - k + 1) / torch.where(square > 0, square, 1)
    return inner + scale * rest


def _xdiag(times: Action, signs: Tensor) -> Tensor:
    """Return the estimate of each vector, ``[d, k]``: ``diag(P M) + v ∘ (I - P) M v``, ``P`` as in ``_xtrace``."""
    images = times(signs)
    basis, spared = _without_one(images)
    of_basis = times(basis)
    whole = (basis * of_basis).sum(dim=1, keepdim=True)
    less = (basis @ spared) * (of_basis @ spared)
    inner = basis.mT @ images
    kept = inner - spared * torch.linalg.vecdot(spared, inner, dim=0)
    return whole - less + signs * (images - basis @ kept)
