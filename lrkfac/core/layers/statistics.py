"""What a batch tells about every layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Statistics(NamedTuple):
    """What a batch tells about every layer, before any linear algebra.

    ``inputs[name][use]`` is what the operation of the layer ``name`` received, ``[N, ...]``;
    ``output_gradients[name][use]`` are the gradients at what it returned, ``[k, N, ...]``, both in the standard form
    of ``lrkfac.core.layers``; ``k`` is the number of samples, or of columns of the output Hessian's square
    root, with the factors of ``lrkfac.core.likelihoods``. ``B = scale * sum of g gᵀ`` over all rows and ``k``; where
    there is no use at all in ``output_gradients[name]`` (``"forward_only"``), ``B`` is the identity.
    """

    inputs: dict[str, tuple[Tensor, ...]]
    output_gradients: dict[str, tuple[Tensor, ...]]
    scale: Tensor


Uses = tuple[Tensor, ...]
"""One tensor for each use of a layer's weight, in the standard form of ``lrkfac.core.layers``."""
