"""Cases of other tests, moved to a device, and what is equal across devices."""

import optree
import torch

from tests.described import identity

TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}
"""Relative differences of a few training steps between a device and float64 on the CPU, by dtype."""


def moved(tree, device, dtype=None):
    """The tree with its tensors on the device, and its floating-point ones in the dtype."""

    def move(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(device, dtype if x.is_floating_point() else None)

    return optree.tree_map(move, tree)


_MOVED = {}


def moved_case(case, device, dtype):
    """A case of ``tests/cases.py``; the same one for each call, so that its layers are described once."""
    key = (*identity(case), str(device), dtype)
    if key not in _MOVED:
        tensors = {name: getattr(case, name) for name in ("params", "inputs", "targets")}
        _MOVED[key] = case, case._replace(**moved(tensors, device, dtype))
    return _MOVED[key][1]


def on_device(tree, device):
    """All tensors of the tree are there."""
    return {x.device for x in optree.tree_leaves(tree) if isinstance(x, torch.Tensor)} <= {device}


def close(found, expected, tolerance, floor=1e-6):
    """Trees of equal structure: each leaf relative to the norm of what is expected, on the CPU in float64."""
    leaves = optree.tree_leaves(found), optree.tree_leaves(expected)
    scale = max(float(x.double().norm()) for x in leaves[1])
    for one, other in zip(*leaves, strict=True):
        one, other = one.detach().cpu().double(), other.detach().cpu().double()
        error, bound = float((one - other).norm()), tolerance * (float(other.norm()) + floor * scale)
        assert error <= bound, f"error {error:.1e}, allowed {bound:.1e}"
