"""What structures say of the eigenproblems within their rounds."""

from __future__ import annotations

from typing import Any


class Solving:
    """Eigenpairs of small matrices that rounds need: of all layers in one call for each size."""

    def takes_eigenpairs(self, round: int) -> bool:
        """Return whether ``advance(carry, answers, round, solved)`` takes them, or else finds them by itself."""
        return False

    def eigenproblem(self, carry: Any, answers: Any, round: int) -> Any:
        """Return a symmetric matrix ``[*, k, k]`` or a tree of some, whose ``Eigenpairs`` are ``solved``."""
        raise NotImplementedError
