"""Second moments of random matrices along orthonormal vectors."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Moments(NamedTuple):
    """Second moments of random matrices ``G`` ``[d_out, d_in]`` along orthonormal columns ``u_i`` and ``v_j``.

    ``kept[i, j] = E (u_iᵀ G v_j)²``, ``output[i] = E ‖u_iᵀ G‖²``, ``input[j] = E ‖G v_j‖²`` and ``total = E ‖G‖²``.
    """

    kept: Tensor
    output: Tensor
    input: Tensor
    total: Tensor


@runtime_checkable
class RandomMatrix(Protocol):
    """The gradients of single examples, known by their second moments: another seam between layers and structures."""

    def moments(self, output_vectors: Tensor, input_vectors: Tensor) -> Moments:
        """Return moments along the orthonormal columns of ``[d_out, r_B]`` and ``[d_in, r_A]``."""
        ...
