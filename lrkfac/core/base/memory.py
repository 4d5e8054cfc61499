"""The memory of devices."""

from __future__ import annotations

import os

import torch


def memory_of(device: torch.device) -> int | None:
    """Return the bytes of memory that a device has, used or not; ``None`` where they are not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
