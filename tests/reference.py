"""Float64 dense references in plain torch, the independent truth of the tests: never imports lrkfac.

Conventions. The outputs of a network hold ``M`` likelihood terms of ``K`` numbers each: one for each entry of
the leading axes where they are logits of classes ``[*, K]``, else one for each example ``[M, ...]``. The loss
is the mean over the terms of the negative log-likelihood. ``g`` is the derivative of the *sum* of the terms
with respect to a layer's output, never divided by M or the batch size. Rows are the uses of a weight:
examples times positions. ``A`` is the mean over all R rows of ``a aᵀ``, with a trailing 1 in ``a`` when there
is a bias (joint bias); ``B`` is the sum over all rows of ``g gᵀ``, divided by M (K-FAC-expand). Factors are
``[groups, d, d]``, one pair for each group of a convolution; a linear layer has one group. The block of a
group's ``[W b]`` (row-major) is ``B ⊗ A``.
"""

import torch
from torch import Tensor
from torch.nn import functional

from tests.cases import LayerSpec


def linear_input_rows(inputs: Tensor, bias: bool) -> Tensor:
    """The rows a of a linear layer with inputs [N, ..., d_in]: [1, R, d_in], or [1, R, d_in + 1] with trailing ones."""
    rows = inputs.double().reshape(1, -1, inputs.shape[-1])
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1) if bias else rows


def conv2d_input_rows(inputs, weight_shape, stride=1, padding=0, dilation=1, groups=1, bias=True) -> Tensor:
    """The patches of inputs [N, C, H, W] that a convolution with weight [d_out, C / groups, kh, kw] uses:
    [groups, N * positions, C / groups * kh * kw (+ 1)], ordered as in weight.reshape(d_out, -1).
    """
    kernel = tuple(weight_shape[2:])
    stride, dilation = _pair(stride), _pair(dilation)
    before = (0, 0) if isinstance(padding, str) else _pair(padding)
    total = [2 * b for b in before]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        before = [t // 2 for t in total]
    (top, left), (height, width) = before, total
    padded = functional.pad(inputs.double(), (left, width - left, top, height - top))
    patches = functional.unfold(padded, kernel, dilation=dilation, stride=stride)
    count, entries, positions = patches.shape
    patches = patches.reshape(count, groups, entries // groups, positions).permute(1, 0, 3, 2)
    rows = patches.reshape(groups, count * positions, entries // groups)
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1) if bias else rows


def linear_output_rows(output_gradients: Tensor) -> Tensor:
    """The rows g, [1, R, d_out], of a linear layer with output gradients [N, ..., d_out]."""
    return output_gradients.double().reshape(1, -1, output_gradients.shape[-1])


def conv2d_output_rows(output_gradients: Tensor, groups: int = 1) -> Tensor:
    """The rows g, [groups, N * H * W, d_out / groups], positions in the order of ``conv2d_input_rows``."""
    count, channels, height, width = output_gradients.shape
    split = output_gradients.double().reshape(count, groups, channels // groups, height * width)
    return split.permute(1, 0, 3, 2).reshape(groups, count * height * width, channels // groups)


def layer_input_rows(layer: LayerSpec, inputs: Tensor) -> Tensor:
    if layer.kind == "linear":
        return linear_input_rows(inputs, layer.bias)
    return conv2d_input_rows(inputs, layer.weight_shape, bias=layer.bias, **layer.options)


def layer_output_rows(layer: LayerSpec, output_gradients: Tensor) -> Tensor:
    if layer.kind == "linear":
        return linear_output_rows(output_gradients)
    return conv2d_output_rows(output_gradients, layer.groups)


def _pair(option: int | tuple[int, int]) -> tuple[int, int]:
    return (option, option) if isinstance(option, int) else tuple(option)


def second_moment(rows: Tensor) -> Tensor:
    """(1/R) Σ_rows r rᵀ, [groups, R, d] to [groups, d, d]."""
    return torch.einsum("gri,grj->gij", rows, rows) / rows.shape[1]


def terms(likelihood: str, outputs: Tensor) -> Tensor:
    """The outputs term by term, [M, K]: K is the last axis for "categorical", all axes but the first for the others."""
    return outputs.reshape(-1, outputs.shape[-1] if likelihood == "categorical" else outputs[0].numel())


def negative_log_likelihood(likelihood: str, outputs: Tensor, targets: Tensor, variance: float = 1.0) -> Tensor:
    """-log p(target | output) of each term, [M]; for "gaussian" without the constant: ‖f - y‖² / (2 variance)."""
    f = terms(likelihood, outputs)
    if likelihood == "categorical":
        return -f.log_softmax(-1).gather(-1, targets.reshape(-1, 1)).squeeze(-1)
    y = targets.reshape(f.shape)
    if likelihood == "bernoulli":
        return (functional.softplus(f) - y * f).sum(-1)
    return ((f - y) ** 2).sum(-1) / (2 * variance)


def output_hessian(likelihood: str, outputs: Tensor, variance: float = 1.0) -> Tensor:
    """The Hessians of the terms in their outputs, [M, K, K]: diag(p) - p pᵀ, diag(p (1 - p)) or I / variance."""
    f = terms(likelihood, outputs)
    if likelihood == "categorical":
        p = f.softmax(-1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    if likelihood == "bernoulli":
        p = f.sigmoid()
        return torch.diag_embed(p * (1 - p))
    return torch.diag_embed(torch.ones_like(f)) / variance


def output_hessian_root(likelihood: str, outputs: Tensor, variance: float = 1.0) -> Tensor:
    """S, [M, K, K], with S Sᵀ = the output Hessian of each term, by its eigendecomposition."""
    values, vectors = torch.linalg.eigh(output_hessian(likelihood, outputs, variance))
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)


def damping_split(A: Tensor, B: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """δ_A = π √damping and δ_B = √damping / π, with π = √(mean eigenvalue of A / mean eigenvalue of B)."""
    pi = (torch.linalg.eigvalsh(A).mean(-1) / torch.linalg.eigvalsh(B).mean(-1)).sqrt()
    return pi * damping**0.5, damping**0.5 / pi


def damped(matrix: Tensor, damping: Tensor | float) -> Tensor:
    """matrix + damping I, for [*, d, d] and damping [*] or a number."""
    damping = torch.as_tensor(damping, dtype=matrix.dtype)
    return matrix + damping[..., None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype)


def kronecker_preconditioned(G: Tensor, A: Tensor, B: Tensor, damping: float) -> Tensor:
    """(B + δ_B I)⁻¹ G (A + δ_A I)⁻¹ with the split damping, for each group."""
    delta_A, delta_B = damping_split(A, B, damping)
    left = torch.linalg.solve(damped(B, delta_B), G)
    return torch.linalg.solve(damped(A, delta_A), left.mT).mT


def exactly_damped_preconditioned(G: Tensor, A: Tensor, B: Tensor, damping: float) -> Tensor:
    """(B ⊗ A + λ I)⁻¹ vec(G), by the whole matrix, for each group."""
    products = torch.stack([torch.kron(*pair) for pair in zip(B, A, strict=True)])
    whole = damped(products, torch.as_tensor([damping] * len(products), dtype=G.dtype))
    return torch.linalg.solve(whole, G.flatten(1)[..., None]).reshape(G.shape)


def running_averages(matrices: list[Tensor], decay: float) -> list[Tensor]:
    """Σ_s decay^(t-s) matrix_s / Σ_s decay^(t-s), unbiased, after each matrix t = 1, 2, ..."""
    averages = []
    for t, matrix in enumerate(matrices, start=1):
        rho = (decay - decay**t) / (1 - decay**t)
        averages.append(matrix if t == 1 else rho * averages[-1] + (1 - rho) * matrix)
    return averages


def truncated(matrix: Tensor, rank: int, residual: str = "none") -> Tensor:
    """The best rank-r approximation V Λ Vᵀ, by magnitude of the eigenvalues; residual="isotropic" adds σ (I - V Vᵀ)
    with σ = (tr matrix - tr Λ) / (d - r), which keeps the trace.
    """
    values, vectors = torch.linalg.eigh(matrix)
    kept = values.abs().argsort(descending=True)[:rank]
    values, vectors = values[kept], vectors[:, kept]
    result, d = vectors @ torch.diag(values) @ vectors.T, len(matrix)
    if residual == "isotropic" and rank < d:
        sigma = (matrix.trace() - values.sum()) / (d - rank)
        result = result + sigma * (torch.eye(d, dtype=matrix.dtype) - vectors @ vectors.T)
    return result


def low_rank_plus_diagonal_dense(matrix: Tensor, rank: int, iterations: int = 2000, tolerance: float = 1e-12):
    """Minimises ‖matrix - V Λ Vᵀ - diag(d)‖_F, Λ and d ≥ 0, by turns from d = 0 until d rests: V, Λ = the r
    largest eigenpairs of matrix - diag(d), Λ clipped at 0; then d = max(0, diag(matrix) - diag(V Λ Vᵀ)).
    """
    diagonal = torch.zeros_like(matrix.diagonal())
    for _ in range(iterations):
        values, vectors = torch.linalg.eigh(matrix - torch.diag(diagonal))
        values, vectors = values.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank]
        previous, diagonal = diagonal, (matrix.diagonal() - vectors**2 @ values).clamp(min=0)
        if (diagonal - previous).abs().max() <= tolerance * matrix.abs().max():
            break
    return vectors, values, diagonal


def negative_power(matrix: Tensor, exponent: float, damping: Tensor | float) -> Tensor:
    """(matrix + damping I)^-exponent, for [*, d, d] and damping [*] or a number."""
    values, vectors = torch.linalg.eigh(damped(matrix, damping))
    return (vectors * values.pow(-exponent)[..., None, :]) @ vectors.mT


def polar_factor(matrix: Tensor, tolerance: float = 1e-10) -> Tensor:
    """U Vᵀ over the singular values that are not rounding, for [*, m, n]."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left * (values > tolerance * values[..., :1]).unsqueeze(-2)) @ right


def spectral_direction(M: Tensor, A: Tensor, B: Tensor, power: float, share: float) -> Tensor:
    """(B + δ_B)^-p polar((B + δ_B)^-p M (A + δ_A)^-p) √max(d_out, d_in) (A + δ_A)^-p, dampings shares of the means."""
    left, right = (negative_power(X, power, share * X.diagonal(dim1=-2, dim2=-1).mean(-1)) for X in (B, A))
    return max(M.shape[-2:]) ** 0.5 * left @ polar_factor(left @ M @ right) @ right


def of_unit_mean_square(matrix: Tensor) -> Tensor:
    """Each matrix of [*, m, n], scaled to root mean square 1."""
    return matrix / matrix.square().mean((-2, -1), keepdim=True).sqrt()
