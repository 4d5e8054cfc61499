"""The layers of cases, each described once: a description is static and costs as much as several steps."""

from typing import Any, Literal

import lrkfac
from tests.cases import Case

_FOUND: dict[tuple[Any, ...], tuple[Case, lrkfac.Layers]] = {}


def identity(case: Case) -> tuple[Any, ...]:
    """What is the same for cases of the same model and tensors, as long as these are kept."""
    return id(case.model), id(case.inputs), id(case.targets), *case.params, *map(id, case.params.values())


def layers_of(case: Case, bias: Literal["joint", "separate"] = "joint") -> lrkfac.Layers:
    """``find_layers`` of a case; those of the same tensors, which no test changes, share it."""
    key = (*identity(case), bias)
    if key not in _FOUND:
        _FOUND[key] = case, lrkfac.find_layers(case.model, case.params, case.inputs, bias=bias)
    return _FOUND[key][1]
