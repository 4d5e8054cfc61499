"""Which ways to a result did not work, so that they are not tried again in each step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lrkfac.core.base.private_torch import transformations
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.specs import signature


class Ways:
    """Ways that failed where another one worked, by the form of parameters and inputs; copies and pickles start empty.

    The compiler tries each way once for all and notes nothing.
    """

    def __init__(self) -> None:
        self._failed: dict[str, set[Any]] = {}

    def __reduce__(self) -> tuple[type[Ways], tuple[()]]:
        return Ways, ()

    def open(self, name: str, params: Tree, inputs: Tree) -> bool:
        """Return whether a way is not known to fail."""
        if torch.compiler.is_compiling() or name not in self._failed:  # forms are looked at where something failed
            return True
        return _form(params, inputs) not in self._failed[name]

    def close(self, names: Iterable[str], params: Tree, inputs: Tree) -> None:
        """Note that some ways fail."""
        if torch.compiler.is_compiling():
            return
        for name in names:
            form = _form(params, inputs)
            if form is not None:
                self._failed.setdefault(name, set()).add(form)


def _form(params: Tree, inputs: Tree) -> Any:
    """Return what decides on it, ``None`` where that may be hidden."""
    form = signature(params, inputs)
    return None if form is None else (form, tuple(transformations()))
