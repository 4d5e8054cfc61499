"""Names of types that all packages use."""

from __future__ import annotations

from typing import Any

Tree = Any
"""A tree of tensors that ``optree`` traverses."""


PerParameter = Any
"""A number or tensor ``[]`` for all parameters, or a tree of them with the structure of the parameters or a prefix of
it.
"""
