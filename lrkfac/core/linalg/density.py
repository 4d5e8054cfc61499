"""The density of a matrix' eigenvalues by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from lrkfac.core.base.arguments import check_flag, check_function, check_integer, check_number
from lrkfac.core.base.autograd import recording
from lrkfac.core.base.types import Tree
from lrkfac.core.linalg.actions import SymmetricMap
from lrkfac.core.linalg.eigen import without_subnormal
from lrkfac.core.linalg.lanczos import krylov, tridiagonal_matrix
from lrkfac.core.linalg.probes import probes_of


class SpectralDensity(NamedTuple):
    """The density of the eigenvalues of a ``[d, d]`` matrix, as nodes and weights for each of ``s`` random vectors.

    ``Σⱼ weightⱼ f(nodeⱼ)`` of one vector ``v`` is ``vᵀ f(M) v / vᵀ v``, exactly for polynomials of degree ``2 m - 1``;
    its mean over random vectors is ``tr f(M) / d``.

    Attributes:
        nodes: ``[s, m]``.
        weights: ``[s, m]``, nonnegative, with the sum 1 for each vector.
        dimension: ``d``, int64 ``[]``.

    Examples:
        >>> import torch, lrkfac
        >>> M = lrkfac.linalg.Diagonal(torch.tensor([1.0, 3.0]))
        >>> found = lrkfac.curvature.spectral_density(M, samples=2, steps=2, noise=torch.eye(2))
        >>> float(found.trace_of(torch.log).exp()), float(found.moment(2))
        (3.0, 5.0)
    """

    nodes: Tensor
    weights: Tensor
    dimension: Tensor

    def moment(self, power: int) -> Tensor:
        """Return the estimate of ``tr(M^power) / d``, ``[]``."""
        check_integer(power, "power", 0)
        return (self.weights * self.nodes**power).sum(dim=1).mean()

    def trace_of(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the estimate of ``tr f(M)``, ``[]``, such as of a log-determinant, for ``f`` of single numbers.

        Nodes of weight 0, where ``f`` may not exist, do not count.

        Raises:
            TypeError: If it is no function.
        """
        check_function(function, "function")
        values = torch.where(self.weights > 0, function(self.nodes), 0)
        return self.dimension * (self.weights * values).sum(dim=1).mean()

    def density(self, points: Tensor, width: float | Tensor) -> Tensor:
        """Return the density at some points ``[n]``, ``[n]``: each node as a Gaussian of standard deviation ``width``.

        Raises:
            ValueError: If ``width`` is not above 0.
        """
        check_number(width, "width", 0, includes_low=False)
        distances = (points[:, None, None] - self.nodes) / width
        bumps = torch.exp(-distances.square() / 2) / (width * math.sqrt(2 * math.pi))
        return (self.weights * bumps).sum(dim=2).mean(dim=1)


def spectral_density(
    operator: SymmetricMap,
    samples: int = 10,
    steps: int = 30,
    generator: Generator | None = None,
    noise: Tree | None = None,
    like: Tree | None = None,
    reorthogonalize: bool = True,
) -> SpectralDensity:
    """Return the density of the eigenvalues of a symmetric matrix by stochastic Lanczos quadrature.

    For each of some random vectors, ``steps`` steps of Lanczos give nodes and weights of a Gauss quadrature (Golub &
    Welsch 1969; Ubaru, Chen & Saad 2017, SIAM J. Matrix Anal. Appl. 38(4); for networks Ghorbani, Krishnan & Xiao 2019,
    arXiv 1901.10159). It takes ``samples * steps`` products. With ``reorthogonalize``, ``steps`` vectors are held at a
    time. ``lrkfac.plot.density`` draws the result.

    Args:
        operator: The matrix: a function, or an operator with ``matvec`` or ``product``, such as those of
            ``lrkfac.curvature``.
        samples: Number ``s`` of random vectors.
        steps: Steps ``m`` of Lanczos for each, at most ``d``.
        generator: Draws the vectors, normal; either it or ``noise``.
        noise: The vectors: ``[d, samples]``, or a tree of leaves ``[samples, ...]``.
        like: A vector ``[d]`` or tree of the shapes and dtypes that the operator takes. Needed with ``generator`` where
            the operator is a function.
        reorthogonalize: See ``lanczos``; without it two vectors are held, and eigenvalues come several times, which
            hardly changes the density.

    Returns:
        A ``SpectralDensity``, with ``moment``, ``trace_of`` and ``density``.

    Raises:
        ValueError: If shapes do not fit, a number is out of range, or not exactly one of ``generator`` and ``noise`` is
            given.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch, lrkfac
        >>> M = lrkfac.linalg.Diagonal(torch.arange(1.0, 101.0))
        >>> found = lrkfac.curvature.spectral_density(M, 20, 10, generator=torch.Generator().manual_seed(0))
        >>> found.nodes.shape, abs(float(found.moment(1)) - 50.5) < 5
        (torch.Size([20, 10]), True)
    """
    check_integer(samples, "samples")
    check_integer(steps, "steps")
    check_flag(reorthogonalize, "reorthogonalize")
    times, vectors, _ = probes_of(operator, samples, generator, noise, like)
    if steps > vectors.shape[0]:
        raise ValueError(f"steps: expected at most {vectors.shape[0]}, the dimension, got {steps}")
    nodes, weights = [], []
    for vector in vectors.unbind(1):  # one after another: a basis is all that memory may hold
        with recording(False):
            alphas, betas, _ = krylov(times, vector.contiguous(), steps, reorthogonalize)
        values, rotation = torch.linalg.eigh(without_subnormal(tridiagonal_matrix(alphas, betas)))
        nodes.append(values)
        weights.append(rotation[0].square())
    dimension = torch.full((), vectors.shape[0], dtype=torch.int64, device=vectors.device)
    return SpectralDensity(torch.stack(nodes), torch.stack(weights), dimension)
