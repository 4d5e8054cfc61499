"""Names of types that every part of the package uses."""

from __future__ import annotations

from typing import Any

Tree = Any
"""Any tree that ``optree`` traverses; the leaves are tensors."""


PerParameter = Any
"""A number, or a tensor ``[]``, for all parameters; or a tree of them like the parameters, or one that ends earlier."""
