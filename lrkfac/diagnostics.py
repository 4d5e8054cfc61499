"""How a preconditioner is doing, from its state: numbers for a logger, and a table."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_number
from lrkfac.core.base.dtypes import wide
from lrkfac.core.base.nested import nested
from lrkfac.core.base.packing import from_rows
from lrkfac.core.base.text import table
from lrkfac.core.base.tree_checks import check_like
from lrkfac.core.base.types import Tree
from lrkfac.core.curvature.blocks import BlockState, signature
from lrkfac.core.curvature.diagnosis import LayerDiagnosis, is_before, needed_rank, of_block
from lrkfac.core.curvature.spectra import SIDES, WHOLE
from lrkfac.core.layers.description import Layer, Layers, check_layers
from lrkfac.core.layers.matrix import layer_matrix
from lrkfac.transforms.clip import ClipByKLState
from lrkfac.transforms.hyperparameters import HyperparametersState
from lrkfac.transforms.precondition_state import PreconditionState
from lrkfac.transforms.quadratic_state import QuadraticModelState
from lrkfac.transforms.robust import ApplyIfFiniteState


class Diagnosis(NamedTuple):
    """The result of ``diagnose``: a tree of numbers; ``print`` shows it as a table, as does ``rich.print``.

    Attributes:
        layers: By name; under ``""`` where one block holds them all.
        chain: Numbers of the chain apart from layers, tensors ``[]``.
    """

    layers: dict[str, LayerDiagnosis]
    chain: dict[str, Tensor]

    def metrics(self, prefix: str = "lrkfac") -> dict[str, Tensor]:
        """Return all numbers by names such as ``"lrkfac/0/A/captured"`` and ``"lrkfac/damping"``, tensors ``[]``.

        Ready for ``for name, x in metrics.items(): writer.add_scalar(name, x, step)``, or ``wandb.log(metrics)``.
        """
        numbers_by_name = dict(self.chain)
        for name, layer in self.layers.items():
            for part, numbers in layer.numbers.items():
                numbers_by_name.update({f"{name or 'all'}/{part}/{what}": x for what, x in numbers.items()})
        return {f"{prefix}/{name}" if prefix else name: x for name, x in numbers_by_name.items()}

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of the table, a heading first; ``x | y`` is of A and of B."""
        rows = [("layer (A | B)", *[heading for heading, *_ in COLUMNS])]
        for name, layer in self.layers.items():
            rows.append((name or "(all layers)", *[_cell(layer, *column[1:]) for column in COLUMNS]))
        used = [i for i, column in enumerate(zip(*rows[1:], strict=True)) if any(column)]
        return [tuple(row[i] for i in used) for row in rows]

    def __str__(self) -> str:
        of_chain = [f"{name}: {x.item():.4g}" for name, x in self.chain.items()]
        return "\n".join([table(self.rows(), right=True), "", *of_chain])

    def __rich__(self) -> Any:
        """Return the table in the terms of rich, which calls this."""
        from rich.box import SIMPLE
        from rich.markup import escape
        from rich.table import Table

        caption = ", ".join(f"{name.replace('_', ' ')} {x.item():.4g}" for name, x in self.chain.items())
        heading, *rows = self.rows()
        shown = Table(box=SIMPLE, caption=caption, caption_justify="left")
        for i, name in enumerate(heading):
            shown.add_column(escape(name), justify="right" if i else "left", no_wrap=True)
        for row in rows:
            shown.add_row(*[escape(cell) for cell in row])
        return shown


COLUMNS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("rank", "rank", (*reversed(SIDES), WHOLE), "{:.0f}"),
    ("captured", "captured", (*reversed(SIDES), WHOLE), "{:.0%}"),
    ("damping", "damping", (*reversed(SIDES), WHOLE), "{:.2g}"),
    ("eff. dim.", "effective_dimension", (WHOLE,), "{:.1f}"),
    ("condition", "condition", (WHOLE,), "{:.1e}"),
    ("drift", "drift", (*reversed(SIDES), WHOLE), "{:.0%}"),
    ("since", "since_statistics", (WHOLE,), "{:.0f}"),
    ("update", "update_norm", (WHOLE,), "{:.2e}"),
)
"""Heading, number, parts and format of each column of the table."""


def diagnose(state: Any, layers: Layers, *, previous: Any = None, updates: Tree = None) -> Diagnosis:
    """Describe the preconditioner, anywhere in the state of a transformation, by numbers.

    For each layer, and each factor ``A``, ``B`` or block ``F`` of it:

    * ``rank``: number of eigenpairs in the state; all, where it has the matrix itself.
    * ``captured``: the share of these in the trace of the running average. The trace that ``residual="none"`` drops is
      not in the state, and not counted.
    * ``damping``: ``δ_A``, ``δ_B`` or ``λ`` in the inverse; of groups, the mean.
    * ``effective_dimension``: ``tr(M (M + δ I)⁻¹)``, the number of directions in which the curvature outweighs the
      damping; of a product, the product of its factors' numbers.
    * ``condition``: the largest over the smallest eigenvalue of the damped average; with ``low_rank_plus_diagonal`` a
      bound above it, from at most twice the largest eigenvalue and the smallest entry of the damped diagonal.
    * ``drift``: with ``previous``, the change of the running average since then, ``‖M - M'‖ / ‖M‖`` in Frobenius norm.
    * ``since_statistics``: the number of steps since the layer's last statistics.
    * ``update_norm``: the length of the update of the layer's weight and joint bias.

    Of the chain: ``since_statistics``, the largest of these numbers; ``learning_rate``, ``momentum``, ``damping``,
    ``factor_damping``, ``gradient_decay``, ``predicted``, ``reduction_ratio``, ``rejected`` (steps) of the quadratic
    model; ``clip_factor`` of ``clip_by_kl``, below 1 where the last step was clipped; ``left_out`` (steps) of
    ``apply_if_finite``; ``hyperparameters/…`` of ``inject_hyperparams``.

    Where processes divide the layers (``owners``), those of this process. Eigenvalues of dense factors are computed, in
    O(d³). Nothing leaves the device, so it can be mapped over an ensemble:
    ``vmap(lambda s: diagnose(s, layers).metrics())(states)``.

    Args:
        state: Of ``precondition_by_fisher``, or of any chain with it; of a ``LowRankKFAC``, its ``chain_state``.
        layers: From ``find_layers``.
        previous: An earlier state of the same transformation.
        updates: The last updates of the transformation. Without them, the last update of the quadratic model is used,
            where there is one.

    Returns:
        The numbers of each layer and of the chain, tensors ``[]``, as a ``Diagnosis``.

    Raises:
        ValueError: If no preconditioner is in the state, or one of other layers; if ``previous`` or ``updates`` do not
            fit, or ``previous`` has seen more statistics (where they are on the CPU and their numbers known).
        TypeError: If an argument has the wrong type, or a custom structure has a state without the
            methods ``spectrum`` and ``inner``.

    Examples:
        >>> import torch, lrkfac
        >>> params, x, y = torch.eye(3), torch.ones(4, 3), torch.tensor([0, 1, 2, 0])
        >>> model = lambda p, x: x @ p.T
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> tx = lrkfac.precondition_by_fisher(layers)
        >>> evaluation = lrkfac.evaluator(model, lrkfac.categorical(), layers, "empirical")(params, x, y)
        >>> _, state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
        >>> (layer,) = lrkfac.diagnose(state, layers).layers.values()
        >>> layer.numbers["A"]["captured"]  # a factor of 3 rows is dense
        tensor(1.)
    """
    check_layers(layers)
    blocks = _blocks("state", state, layers)
    before = {} if previous is None else _blocks("previous", previous, layers)
    forms = [{name: signature(block.average) for name, block in each.items()} for each in (blocks, before)]
    if previous is not None and forms[0] != forms[1]:
        raise ValueError("previous: expected an earlier state of the same transformation, got one of another form")
    if any(is_before(block.average, before[name].average) for name, block in blocks.items() if name in before):
        raise ValueError("previous: expected an earlier state than state, got a later one; are the two swapped?")
    diagnosed = {name: of_block(block, before.get(name)) for name, block in blocks.items()}
    for _, one in nested(state, PreconditionState):
        for name, since in zip(sorted(one.blocks), one.since.unbind(-1), strict=True):
            if name in diagnosed:
                diagnosed[name].numbers[WHOLE]["since_statistics"] = since
    leaves = _updates(state, layers, updates)
    for name, one in diagnosed.items() if leaves is not None else ():
        of_block_layers = [layer for layer in layers if name in ("", layer.name)]
        squares = [wide(layer_matrix(layer, leaves or []).joined()).square().sum() for layer in of_block_layers]
        one.numbers[WHOLE]["update_norm"] = torch.stack(squares).sum().sqrt()
    return Diagnosis(diagnosed, _of_chain(state))


def _blocks(what: str, state: Any, layers: Layers) -> dict[str, BlockState]:
    """Return the states of all blocks in a state, by layer."""
    blocks: dict[str, BlockState] = {}
    preconditioners = [one for _, one in nested(state, PreconditionState)]
    for one in preconditioners:
        for name, block in one.blocks.items():
            if block == ():  # another process owns it
                continue
            if name in blocks:
                raise ValueError(
                    f"{what}: layer {name!r} has two preconditioners in it; diagnose the state of each by itself"
                )
            blocks[name] = block
    if not blocks and not any(one.blocks for one in preconditioners):
        raise ValueError(
            f"{what}: expected the state of precondition_by_fisher(layers), or of a chain with it, got "
            f"{type(state).__name__} without one; of a LowRankKFAC, pass its chain_state"
        )
    names = [layer.name for layer in layers]
    for name, block in blocks.items():
        if name and name not in names:
            raise ValueError(f"{what}: expected one of the layers {names}, got one with {name!r}; pass its layers")
        if block.average.is_product:
            _check(what, layers[name], block)
    return blocks


def _check(what: str, layer: Layer, block: BlockState) -> None:
    expected = (layer.d_out * layer.d_in, int(layer.groups > 1))
    if (block.inverse.dimension, block.average.factor_states()[0].steps.ndim) != expected:
        raise ValueError(
            f"{what}: expected factors of B {layer.d_out} and A {layer.d_in} for layer {layer.name!r}, got the form "
            f"{signature(block.average)}; pass the layers of its transformation, and map over the states of an "
            "ensemble: vmap(lambda s: diagnose(s, layers).metrics())(states)"
        )


def _updates(state: Any, layers: Layers, updates: Tree) -> list[Any] | None:
    """Return the leaves of the updates, or of the last updates of the quadratic models in a state."""
    if updates is not None:
        return check_like(layers.tree, updates, "updates")
    every = [one.last for _, one in nested(state, QuadraticModelState)]
    size = sum(math.prod(p.shape) for p in layers.parameters)
    if not every or any(sum(row.numel() for row in rows) != size for rows in every):
        return None
    sums = tuple([torch.stack(rows).sum(dim=0) for rows in zip(*every, strict=True)])
    return from_rows(sums, [torch.empty(p.shape, dtype=sums[0].dtype, device="meta") for p in layers.parameters])


def _of_chain(state: Any) -> dict[str, Tensor]:
    numbers: list[tuple[str, str, Tensor]] = []
    for path, one in nested(state, REPORTED):
        if isinstance(one, PreconditionState):
            numbers.append((path, "since_statistics", one.since.amax()))
        elif isinstance(one, QuadraticModelState):
            numbers += [(path, name, getattr(one, name)) for name in QUADRATIC]
        elif isinstance(one, ClipByKLState):
            numbers.append((path, "clip_factor", one.factor))
        elif isinstance(one, HyperparametersState):
            numbers += [(path, f"hyperparameters/{name}", x) for name, x in one.hyperparameters.items()]
        else:
            numbers.append((path, "left_out", one.total))
    often = Counter(name for _, name, _ in numbers)
    return {name if often[name] == 1 else f"{path}/{name}": x for path, name, x in numbers}


CHOSEN = "learning_rate", "momentum", "damping", "factor_damping", "gradient_decay"
QUADRATIC = (*CHOSEN, "predicted", "reduction_ratio", "rejected")
REPORTED = PreconditionState | QuadraticModelState | ClipByKLState | HyperparametersState | ApplyIfFiniteState


def _cell(layer: LayerDiagnosis, what: str, parts: tuple[str, ...], pattern: str) -> str:
    """Return the numbers of one name, of each part that has it."""
    numbers = [layer.numbers[part][what] for part in parts if what in layer.numbers.get(part, {})]
    return " | ".join(pattern.format(x.item()) for x in numbers)


def ranks_by_trace(state: Any, layers: Layers, share: float = 0.95) -> dict[str, int]:
    """Return for each layer the least rank whose eigenpairs hold a share of the traces of both factors.

    From the eigenvalues in the state, after some batches of statistics. A rank is a shape, fixed when a transformation
    is made: make another, ``low_rank_kfac(layers, 0.1, rank=ranks_by_trace(state, layers))``, and begin with its
    ``init(params)``; its first statistics compute new averages. To drop the other eigenpairs within a state of fixed
    shape would save neither memory nor operations, and know less.

    Args:
        state: As for ``diagnose``. Layers that are no products, and factors that are diagonal, are left out.
        layers: From ``find_layers``.
        share: Of the trace, in (0, 1).

    Returns:
        From names to ranks, at most the present ones. Where all eigenpairs together hold less than the share, their
        number: make the rank larger and look again.

    Raises:
        ValueError: If ``share`` is out of range, if there were no statistics yet, or as ``diagnose``.
        TypeError: If an argument has the wrong type, or as ``diagnose``.

    Examples:
        >>> import torch, lrkfac
        >>> params, x, y = torch.eye(3), torch.ones(4, 3), torch.tensor([0, 1, 2, 0])
        >>> model = lambda p, x: x @ p.T
        >>> layers = lrkfac.find_layers(model, params, x)
        >>> tx = lrkfac.precondition_by_fisher(layers)
        >>> evaluation = lrkfac.evaluator(model, lrkfac.categorical(), layers, "empirical")(params, x, y)
        >>> _, state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
        >>> list(lrkfac.ranks_by_trace(state, layers).values())  # inputs of rank 1, output gradients of rank 2
        [2]
    """
    check_layers(layers)
    check_number(share, "share", 0, 1, includes_low=False)
    ranks: dict[str, int] = {}
    for name, block in _blocks("state", state, layers).items():
        if block.average.is_product:
            sides = block.average.factor_states()
            if any((side.steps == 0).any() for side in sides):
                raise ValueError(f"state: expected one after some statistics, got one without any of layer {name!r}")
            free = [side for side in sides if not getattr(side, "fixed_basis", False)]
            ranks[name] = max([1, *[int(needed_rank(side, share)) for side in free]])
    return ranks
