"""The polar factor of a matrix: the nearest one whose singular values are all 1."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lrkfac.core.base.arguments import check_integer

COEFFICIENTS = (
    (8.470328804, -25.108074707, 18.629275599),
    (4.182834183, -3.108701110, 0.580606681),
    (3.961857279, -2.954063746, 0.562976118),
    (3.286586217, -2.464720135, 0.507357694),
    (2.273749994, -1.644660368, 0.416190927),
    (1.888716197, -1.265157225, 0.376518926),
    (1.875, -1.25, 0.375),
)
"""``a, b, c`` of the polynomials ``a x + b x³ + c x⁵`` that bring singular values to 1, one after another.

Each is the nearest to 1 on the interval to which those before it bring [1e-3, 1] (Amsel et al. 2025, arXiv 2505.16932);
they leave 0.99, 0.96, 0.86, 0.55, 0.11, 9e-4 and 2e-9 to 1. The last one, that of Newton and Schulz, is repeated.
"""


SLACK = 1.02
"""By how much bfloat16 may lift singular values above 1 in a step: the first polynomials have large slopes there."""


ITERATIONS = 6
"""Steps by default: 18 products of matrices."""


def polar(matrix: Float[Tensor, "*many m n"], iterations: int | None = ITERATIONS) -> Float[Tensor, "*many m n"]:
    """Return the polar factor ``U Vᵀ`` of ``W = U Σ Vᵀ``: the nearest matrix with orthonormal rows, or columns.

    It is the steepest direction of all with spectral norm 1: ``⟨W, D⟩`` is largest there (Bernstein & Newhouse 2024,
    arXiv 2409.20325). By steps ``X ← a X + (b X Xᵀ + c (X Xᵀ)²) X`` on the smaller side, which act on singular values
    alone and start from ``X = W / (Σ σ⁴)^¼``: Newton–Schulz iterations as in Muon (Jordan et al. 2024), with
    polynomials that are optimal one after another, see ``COEFFICIENTS``.

    Args:
        matrix: ``[*, m, n]``, wide or tall, of any scale.
        iterations: Steps, of three products of matrices each. After 5, 6 and 7 singular values that are at least a
            thousandth of the start's scale are within 0.11, 1e-3 and 1e-8 of 1; smaller ones are raised a
            thousandfold. ``None`` takes the singular vectors themselves, for which a GPU waits.

    Returns:
        The factor in the dtype of the matrix. Where singular values are 0 it is 0 along their vectors: of a zero
        matrix, zero. With ``None``, those below 2e-5 of the largest count as 0, in float64 below 4e-11. Products are
        in at least float32; with iterations on CUDA, in bfloat16 unless the matrix is float64.

    Raises:
        ValueError: If ``iterations`` is below 1, or ``matrix`` has fewer than two axes.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> from lrkfac.linalg import polar
        >>> polar(torch.tensor([[3.0, 0.0, 0.0], [0.0, -0.2, 0.0]])).round(decimals=2)
        tensor([[ 1.,  0.,  0.],
                [ 0., -1.,  0.]])
    """
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        got = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"matrix: expected a floating-point tensor [*, m, n], got {got}")
    if matrix.ndim < 2:
        raise ValueError(f"matrix: expected a tensor [*, m, n], got the shape {tuple(matrix.shape)}")
    if iterations is not None:
        check_integer(iterations, "iterations")
    if not matrix.numel():
        return matrix.clone()
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    # Squares of all entries stay in range, whatever the scale.
    largest = wide.abs().amax(dim=(-2, -1), keepdim=True)
    wide = wide / torch.where(largest > 0, largest, 1.0)
    if iterations is None:
        return _by_singular_vectors(wide).to(matrix.dtype)
    dtype = torch.bfloat16 if wide.is_cuda and wide.dtype == torch.float32 else wide.dtype
    return newton_schulz(wide, iterations, dtype).to(matrix.dtype)


def newton_schulz(matrix: Tensor, iterations: int, dtype: torch.dtype) -> Tensor:
    """Return the polar factor after some steps, with products in a dtype; entries are at most 1."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.reshape(-1, *matrix.shape[-2:])
    x = x.mT if tall else x
    gram = x @ x.mT
    square = torch.linalg.matrix_norm(gram, keepdim=True)  # its root is (Σ σ⁴)^¼, between ‖W‖₂ and ‖W‖
    square = torch.where(square > 0, square, 1.0)
    x, gram = (x / square.sqrt()).to(dtype), (gram / square).to(dtype)
    slack = SLACK if dtype == torch.bfloat16 else 1.0
    for i in range(iterations):
        a, b, c = COEFFICIENTS[min(i, len(COEFFICIENTS) - 1)]
        if slack > 1 and i < len(COEFFICIENTS) - 1:
            a, b, c = a / slack, b / slack**3, c / slack**5
        gram = x @ x.mT if i else gram
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrix.shape).to(matrix.dtype)


def _by_singular_vectors(matrix: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    noise = torch.finfo(matrix.dtype).eps ** (2 / 3) * values[..., :1]  # also of the products that made the matrix
    return (left * (values > noise)[..., None, :]) @ right
