"""The state of a preconditioner."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class PreconditionState(NamedTuple):
    """State of ``precondition_by_fisher``.

    Attributes:
        blocks: By layer name, the running average of the block, its damped inverse as of the last statistics, and the
            dampings in that, with a leading axis for groups. With ``owners``, ``()`` where another process owns it.
        since: For each block, sorted by name, the number of steps since its last statistics, int64 ``[n]``.
        fallback: The state of the transformation of all other parameters.
    """

    blocks: dict[str, Any]
    since: Tensor
    fallback: Any

    @property
    def preconditions(self) -> bool:
        """Marks the state of a transformation that preconditions and takes the extra ``factor_damping``."""
        return True

    @property
    def factors(self) -> dict[str, Any]:
        """The running averages, by layer name."""
        return {name: block.average for name, block in self.blocks.items() if block}

    @property
    def inverses(self) -> dict[str, Any]:
        """Their damped inverses, by layer name."""
        return {name: block.inverse for name, block in self.blocks.items() if block}

    @property
    def dampings(self) -> dict[str, Tensor]:
        """``δ_B`` and ``δ_A`` of a product, ``[2]``, else ``λ``, ``[]``, by layer name."""
        return {name: block.dampings for name, block in self.blocks.items() if block}
