"""The layers of cases, each described once: a description is static and costs as much as several steps."""

from typing import Any, Literal

import lrkfac
from tests.cases import Case

_FOUND: dict[tuple[Any, ...], tuple[Case, lrkfac.Layers]] = {}


def layers_of(case: Case, bias: Literal["joint", "separate"] = "joint") -> lrkfac.Layers:
    """``find_layers`` of a case; those of the same tensors, which no test changes, share it."""
    key = (id(case.model), id(case.inputs), *case.params, *map(id, case.params.values()), bias)
    if key not in _FOUND:
        # The case is kept, or another could have the same numbers.
        _FOUND[key] = case, lrkfac.find_layers(case.model, case.params, case.inputs, bias=bias)
    return _FOUND[key][1]
