"""Statistics of a batch as structures take them: Kronecker factors, and gradients of single examples."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from lrkfac.core.base.dtypes import wide
from lrkfac.core.base.processes import Processes
from lrkfac.core.base.rows import padded, with_ones
from lrkfac.core.curvature.covariances import kronecker_parts, of_parts
from lrkfac.core.layers.description import Layer, Treatment
from lrkfac.core.layers.kinds import KINDS
from lrkfac.core.layers.matrix import weight_gradient
from lrkfac.core.layers.statistics import Uses
from lrkfac.core.linalg.covariances import Covariance, KroneckerFactors, SummedCovariance
from lrkfac.core.linalg.moments import Moments


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one group of a layer, from which each structure computes what it needs.

    With ``G_n = Σ_t g_t a_tᵀ``, ``t`` over the positions and uses of an example, for each sample or column,
    expectations are ``scale * sum`` over examples and samples.

    Attributes:
        layer: The layer.
        inputs: Inputs of the group, one tensor for each use.
        gradients: The gradients at its outputs, likewise, or none.
        scale: Weight of each example, ``[]``.
        stacked: Whether those of several layers are stacked along a leading axis, for Kronecker factors alone.
        share: Of the examples of all processes, the share here, ``[]``; ``None`` on one process.
        first: Whether this is the first process, which alone counts what is the same on all.
        processes: Those over which covariances and moments are summed; ``None`` where parts are asked for, or on one.
    """

    layer: Layer
    inputs: Uses
    gradients: Uses
    scale: Tensor
    stacked: bool = False
    share: Tensor | None = None
    first: bool = True
    processes: Processes | None = None
    _made: dict[Treatment, tuple[KroneckerFactors, ...]] = field(default_factory=dict, compare=False, repr=False)

    def kronecker_factors(self, treatment: Treatment) -> KroneckerFactors:
        """Return the factors ``B`` and ``A``."""
        parts = self.kronecker_parts(treatment)
        return of_parts(tuple([KroneckerFactors(*[self.summed(x) for x in part]) for part in parts]))

    def kronecker_parts(self, treatment: Treatment) -> tuple[KroneckerFactors, ...]:
        """Return their parts; once made, the same in each round."""
        if treatment not in self._made:
            uses = self.inputs, self.gradients, self.scale
            parts = kronecker_parts(self.layer, *uses, treatment, self.stacked, self.share, self.first)
            self._made[treatment] = parts
        return self._made[treatment]

    def summed(self, covariance: Covariance) -> Covariance:
        """Return the sum over processes."""
        return covariance if self.processes is None else SummedCovariance(covariance, self.processes)

    def example_gradients(self) -> Float[Tensor, "n o i"]:
        """Return the gradients of all examples and samples."""
        return example_gradients(self.layer, self.inputs, self.gradients).flatten(0, 1)

    def moments(self, output_vectors: Float[Tensor, "o p"], input_vectors: Float[Tensor, "i q"]) -> Moments:
        """Return second moments along orthonormal columns, without forming more than memory holds anyway.

        Without sharing from the projected rows alone: ``E (uᵀg)² (aᵀv)²``, ``E (uᵀg)² ‖a‖²`` and so on. With few
        positions in wide layers from the Gram matrices of each example's rows, ``‖G‖² = Σ_{t,s} g_tᵀg_s a_tᵀa_s``. Else
        by the matrices ``G_n`` of a few examples at a time, which together are no larger than the rows.
        """
        k = self.gradients[0].shape[0]
        d_out, d_in = self.layer.d_out, self.layer.d_in
        numbers = sum(x.numel() for x in (*self.inputs, *self.gradients))
        rows, positions = None, 0
        if has_rows(self.layer):
            rows = rows_by_example(self.layer, self.inputs, self.gradients)
            positions = rows[0].shape[1]
        if rows is not None and positions == 1:
            totals = _without_sharing(*rows, output_vectors, input_vectors)
        elif rows is not None and positions * (d_out + d_in) <= d_out * d_in:
            each = k * (output_vectors.shape[1] * input_vectors.shape[1] + positions**2)
            parts = zip(*(x.split(max(1, numbers // each), dim=-3) for x in rows), strict=True)
            totals = _sum([_by_gram_matrices(a, g, output_vectors, input_vectors) for a, g in parts])
        else:
            size = max(1, numbers // (k * d_out * d_in))
            inputs, gradients = with_all_examples(self.inputs, self.gradients)
            parts = zip(_split(inputs, size, 0), _split(gradients, size, 1), strict=True)
            totals = _sum([self._by_matrices(a, g, output_vectors, input_vectors) for a, g in parts])
        scaled = [self.scale.to(total.dtype) * total for total in totals]
        return Moments(*(scaled if self.processes is None else self.processes.sum(scaled)))

    def _by_matrices(self, a: Uses, g: Uses, u: Tensor, v: Tensor) -> Moments:
        matrices = example_gradients(self.layer, a, g).flatten(0, 1)
        left, right = u.mT @ matrices, matrices @ v
        squares = (x.square().sum(dim=0) for x in (left @ v, left, right, matrices))
        kept, output, input, total = squares
        return Moments(kept, output.sum(dim=1), input.sum(dim=0), total.sum())


def has_rows(layer: Layer) -> bool:
    """Return whether the rows of a layer need no unfolding."""
    return all(KINDS[kind].rows is not None for kind in layer.kinds)


def has_rows_of_numbers(layer: Layer) -> bool:
    """Return whether that is so and the rows of its weight are not picked by number, as those of an embedding are."""
    return has_rows(layer) and not any(KINDS[kind].one_hot for kind in layer.kinds)


def rows_by_example(
    layer: Layer, inputs: Uses, gradients: Uses
) -> tuple[Float[Tensor, "n t i"], Float[Tensor, "k n t o"]]:
    """Return the rows ``a`` and ``g`` of one group by example and position; see ``has_rows``."""
    inputs, gradients = with_all_examples(inputs, gradients)
    joint = layer.appends
    of_inputs, of_gradients = [], []
    for a, g, kind in zip(inputs, gradients, layer.kinds, strict=True):
        rows = KINDS[kind].rows
        assert rows is not None
        g = wide(g).reshape(*g.shape[:2], -1, g.shape[-1])
        a = rows(wide(a), layer.d_in - joint).unflatten(0, (g.shape[1], -1))
        a = a.expand(-1, g.shape[2], -1)  # the constant input of a bias has no positions
        of_inputs.append(with_ones(a) if joint else a)
        of_gradients.append(g)
    return torch.cat(of_inputs, dim=1), torch.cat(of_gradients, dim=2)


def _without_sharing(a: Tensor, g: Tensor, u: Tensor, v: Tensor) -> Moments:
    a, g = a[:, 0], g[:, :, 0]
    along_in, along_out = (a @ v).square(), (g @ u).square().sum(dim=0)
    whole_in, whole_out = a.square().sum(dim=1), g.square().sum(dim=(0, 2))
    return Moments(along_out.mT @ along_in, along_out.mT @ whole_in, along_in.mT @ whole_out, whole_out @ whole_in)


def _by_gram_matrices(a: Tensor, g: Tensor, u: Tensor, v: Tensor) -> Moments:
    x, y, of_inputs, of_gradients = a @ v, g @ u, a @ a.mT, g @ g.mT
    return Moments(
        (y.mT @ x).square().sum(dim=(0, 1)),
        (y * (of_inputs @ y)).sum(dim=(0, 1, 2)),
        (x * (of_gradients.sum(dim=0) @ x)).sum(dim=(0, 1)),
        (of_inputs * of_gradients).sum(),
    )


def _sum(parts: list[Moments]) -> Moments:
    return Moments(*[torch.stack(values).sum(dim=0) for values in zip(*parts, strict=True)])


def _split(uses: Uses, size: int, axis: int) -> list[Uses]:
    return list(zip(*(x.split(size, dim=axis) for x in uses), strict=True))


def with_all_examples(inputs: Uses, gradients: Uses, examples: int | None = None) -> tuple[Uses, Uses]:
    """Return the uses of a layer with as many examples each, zeros behind where a use has fewer.

    So it is where heads have examples of their own, see ``joint``: in each sample or column, an example then belongs to
    one head.
    """
    number = max([a.shape[0] for a in inputs]) if examples is None else examples
    if all(a.shape[0] == number for a in inputs):
        return inputs, gradients
    lengthened = tuple([padded(g.movedim(1, 0), number).movedim(0, 1) for g in gradients])
    return tuple([padded(a, number) for a in inputs]), lengthened


def example_gradients(layer: Layer, inputs: Uses, gradients: Uses) -> Float[Tensor, "k n o i"]:
    """Return ``Σ g aᵀ`` over uses and positions of each example of one group, for each sample or column."""
    inputs, gradients = with_all_examples(inputs, gradients)
    joint = layer.appends

    def one(a: Uses, g: Uses) -> Tensor:
        return weight_gradient(layer, a, g, joint)

    a, g = tuple(wide(x) for x in inputs), tuple(wide(x) for x in gradients)
    return vmap(vmap(one), in_dims=(None, 0))(a, g)


@dataclass(frozen=True)
class JointStatistics:
    """Statistics of all layers together: the gradients of single examples.

    Attributes:
        layers: For each layer, itself, its inputs and output gradients, with a leading axis for groups.
        scale: Weight of each example, ``[]``.
    """

    layers: tuple[tuple[Layer, Uses, Uses], ...]
    scale: Tensor

    def example_gradients(self) -> Float[Tensor, "n p 1"]:
        """Return the gradients of all parameters, of all examples and samples."""
        rows = []
        for layer, inputs, gradients in self.layers:
            columns = gradients[0].shape[layer.groups > 1]
            of_all = gradients_of_all_groups(layer, inputs, gradients)
            rows.append(of_all.reshape(columns, of_all.shape[0] // columns, -1))
        examples = max([x.shape[1] for x in rows])
        whole = [padded(x.movedim(1, 0), examples).movedim(0, 1) if x.shape[1] < examples else x for x in rows]
        return torch.cat(whole, dim=2).flatten(0, 1)[:, :, None]

    def summed(self, covariance: Covariance) -> Covariance:
        """Return the covariance: only a dense matrix holds all layers, and asks in a round of its own."""
        return covariance

    def kronecker_factors(self, treatment: Treatment) -> KroneckerFactors:
        """Raise: layers together have no factors."""
        raise NotImplementedError

    def kronecker_parts(self, treatment: Treatment) -> tuple[KroneckerFactors, ...]:
        """Raise: layers together have no factors."""
        raise NotImplementedError

    def moments(self, output_vectors: Tensor, input_vectors: Tensor) -> Moments:
        """Raise: layers together have no common bases."""
        raise NotImplementedError


def gradients_of_all_groups(layer: Layer, inputs: Uses, gradients: Uses) -> Tensor:
    """Return examples' gradients ``[k n, groups, d_out, d_in]``."""
    if layer.groups == 1:
        return example_gradients(layer, inputs, gradients).flatten(0, 1)
    grouped = vmap(lambda a, g: example_gradients(layer, a, g))(inputs, gradients)
    return grouped.permute(1, 2, 0, 3, 4).flatten(0, 1)
