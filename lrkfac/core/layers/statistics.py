"""Statistics of a batch, layer by layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Uses = tuple[Tensor, ...]
"""One tensor for each use of a layer's weight, in the standard form of ``lrkfac.core.layers``."""


class Statistics(NamedTuple):
    """The rows of every layer on a batch, before any linear algebra.

    The factors of a layer are ``A = mean of a aᵀ`` and ``B = scale * sum of g gᵀ``, over all rows and all ``k``.
    ``k`` is the number of samples, or of columns of the output Hessian's square root, with the factors of
    ``lrkfac.core.likelihoods``. Tensors are in the standard form of ``lrkfac.core.layers``. A layer without any use in
    both dictionaries is left as it is.

    Attributes:
        inputs: ``inputs[name][use]`` are the inputs ``a`` of the layer ``name``, ``[N, ...]``.
        output_gradients: ``output_gradients[name][use]`` are the gradients ``g`` at its outputs, ``[k, N, ...]``; no
            use at all (``"forward_only"``) stands for ``B = I``.
        scale: Factor of the sum, ``[]``.
        residuals: With ``"exact"``, a tensor ``ρ`` ``[k, N]`` for each head, of its columns: with the gradient ``G`` of
            a term in all weights that ``a`` and ``g`` of one column give, the gradient of the loss is ``scale * sum of
            ρ G``. Empty for other estimators, with random signs, for some of the examples, and for likelihoods without
            ``residual``.

    Examples:
        >>> import torch, lrkfac
        >>> model, params = lrkfac.from_module(torch.nn.Linear(3, 2))
        >>> inputs, targets = torch.randn(8, 3), torch.randint(2, (8,))
        >>> layers = lrkfac.find_layers(model, params, inputs)
        >>> evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers, samples=5)
        >>> statistics = evaluate(params, inputs, targets).statistics
        >>> name, = statistics.inputs
        >>> statistics.inputs[name][0].shape, statistics.output_gradients[name][0].shape
        (torch.Size([8, 3]), torch.Size([5, 8, 2]))
    """

    inputs: dict[str, Uses]
    output_gradients: dict[str, Uses]
    scale: Tensor
    residuals: Uses = ()
