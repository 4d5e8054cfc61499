"""Everything that the package uses of ``fully_shard`` without torch documenting it; see ``private_torch.py``.

Written for torch 2.11 to 2.14. ``tests/core/base/test_private_fsdp.py`` has a test for each function.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def is_fully_sharded(module: nn.Module) -> bool:
    """Return whether ``fully_shard`` manages the parameters of a module."""
    return getattr(module, "_is_fsdp_managed_module", False)


def casts_of_fully_shard(module: nn.Module) -> Any:
    """Return the ``MixedPrecisionPolicy`` of a module that ``fully_shard`` wraps, ``None`` for other modules."""
    state: Any = getattr(module, "_get_fsdp_state", None)
    return None if state is None else state()._mp_policy


def unwrapped_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a copy of a module as it was before ``fully_shard``, which forbids copies and has hooks that gather.

    Args:
        module: The module.
        memo: As of ``copy.deepcopy``, with entries for all parameters.
    """
    shells = {}
    for part in module.modules():
        kind = type(part)
        if hasattr(part, "_get_fsdp_state"):  # a class of torch between the module and its own one
            kind = kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)]
        shells[part] = memo[id(part)] = kind.__new__(kind)
    for part, shell in shells.items():
        attributes = {name: x for name, x in vars(part).items() if not name.startswith("__composable_api_state_key")}
        for name, x in attributes.items():
            if name.endswith("_hooks") and isinstance(x, dict):
                theirs = [
                    key for key, f in x.items() if getattr(f, "__module__", "").startswith("torch.distributed.fsdp")
                ]
                attributes[name] = type(x)((key, hook) for key, hook in x.items() if key not in theirs)
        vars(shell).update(copy.deepcopy(attributes, memo))
        vars(shell).pop("_is_fsdp_managed_module", None)
    return shells[module]
