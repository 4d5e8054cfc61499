"""Checkpoints on disk: one file of tensors with the structure of their trees, replaced as a whole or not at all."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import zlib
from itertools import zip_longest
from pathlib import Path
from typing import Any

import optree
from torch import Tensor

from lrkfac.core.base.arguments import check_values
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.description import Layers
from lrkfac.state_dicts import form, from_state_dict, named, state_dict
from lrkfac.version import __version__

__all__ = ["from_state_dict", "load", "save", "state_dict"]

FORMAT = 2
"""Number of what stands in the file beside the tensors; it changes with every change of that."""
KEY = "lrkfac"


def save(path: str | os.PathLike[str], params: Tree, state: Tree, layers: Layers | None = None) -> None:
    """Writes parameters and state to a file of safetensors, with the structure of both trees in its metadata.

    The file is written under another name in the same folder, forced to disk, and renamed: whenever the process or the
    machine stops, ``path`` holds the last whole checkpoint (and a hidden ``.<name>.*.tmp`` may be left beside it).

    Args:
        path: Of the file, by custom ``*.safetensors``. One that is there is replaced.
        params: Parameters, or any tree with them, such as ``{"params": params, "buffers": buffers, "step": 7,
            "generator": torch.get_rng_state()}``. Leaves are tensors, numbers or strings.
        state: The state of a transformation.
        layers: From ``find_layers``; its table is kept, and compared by ``load(..., layers=layers)``.

    Raises:
        ImportError: Without safetensors, the extra ``checkpoint``.
        FileNotFoundError: If there is no such folder.
        ValueError: If ``path`` is a folder, or a tensor is on the device "meta".
        TypeError: If a leaf is neither tensor, number nor string, ``layers`` no layers, or ``path`` no path; names it.
    """
    save_file = _safetensors().torch.save_file
    target = _path(path).resolve()
    check_values(params=params, state=state)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: expected a file in a folder that exists, got {str(path)!r}; make the folder")
    tensors: dict[str, Tensor] = {}
    found = {
        "format": FORMAT,
        "version": __version__,
        "layers": None if layers is None else _table(layers),
        "params": _described("params", params, tensors),
        "state": _described("state", state, tensors),
    }
    written = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        save_file(tensors, written, metadata={KEY: json.dumps(found)})
        _force(written)
        os.replace(written, target)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere, folders cannot be opened
        _force(target.parent)


def load(path: str | os.PathLike[str], params: Tree, state: Tree, layers: Layers | None = None) -> tuple[Tree, Tree]:
    """Reads what ``save`` wrote into trees like ``params`` and ``state``, whose values do not matter.

    A run that goes on with what it returns, bit for bit goes on as if it had not stopped. Each tensor has a checksum,
    nothing is unpickled, and no class is looked up by name.

    Args:
        path: Of the file.
        params: A tree like the one that was saved; tensors come to the devices of its leaves.
        state: Such as ``tx.init(params)``.
        layers: If given, those in the file must be the same.

    Returns:
        ``(params, state)``.

    Raises:
        ImportError: Without safetensors, the extra ``checkpoint``.
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint or damaged, another version of lrkfac wrote it, or its layers or trees
            differ in names, classes, shapes or dtypes; says in what.
        TypeError: As ``save``.
    """
    safetensors = _safetensors()
    table = None if layers is None else _table(layers)
    check_values(params=params, state=state)
    named(params, "params"), named(state, "state")  # refuses other leaves before the file is read
    if not _path(path).exists():
        raise FileNotFoundError(f"path: expected a file of lrkfac.checkpoint.save, there is none: {str(path)!r}")
    damaged = (safetensors.SafetensorError, json.JSONDecodeError, LookupError, TypeError, AttributeError, RuntimeError)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            found = json.loads((file.metadata() or {})[KEY])
            _check_version(found, path)
            if table is not None:
                _check_layers(table, found["layers"])
            return _read("params", params, found["params"], file), _read("state", state, found["state"], file)
    except damaged as error:
        raise ValueError(
            f"path: expected a file that lrkfac.checkpoint.save wrote, got {str(path)!r}, which is another or damaged "
            f"({type(error).__name__}: {error})"
        ) from error


def _path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected the path of a file, got {type(path).__name__}")
    if Path(path).is_dir():
        raise ValueError(f"path: expected the path of a file, got the folder {str(path)!r}")
    return Path(path)


def _described(what: str, tree: Tree, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Each leaf of a tree as JSON: name, the classes around it, form, and its value or how it lies in memory."""
    leaves = []
    for (name, leaf), classes in zip(named(tree, what), _classes(tree), strict=True):
        one: dict[str, Any] = {"name": name, "within": classes, "form": form(leaf)}
        if isinstance(leaf, Tensor):
            dense, one["order"] = _laid_out(leaf.detach())
            tensors[f"{what}.{name}"] = held = dense.to("cpu", copy=True).contiguous()
            one["crc32"] = _checksum(held)
        else:
            one["value"] = leaf
        leaves.append(one)
    return leaves


def _laid_out(x: Tensor) -> tuple[Tensor, list[int]]:
    """The numbers of a tensor as they lie in memory, each once, and the order of the axes there.

    A file holds rows after rows, but rounding may depend on how a matrix lies in memory, so that is kept.
    """
    for axis, step in enumerate(x.stride()):
        if step == 0 and x.shape[axis]:
            x = x.narrow(axis, 0, 1)
    order = [axis for _, axis in sorted((-step, axis) for axis, step in enumerate(x.stride()))]
    return x.permute(order), order


def _read(what: str, like: Tree, found: list[dict[str, Any]], file: Any) -> Tree:
    expected = [
        (name, classes, form(leaf), leaf) for (name, leaf), classes in zip(named(like), _classes(like), strict=True)
    ]
    remedy = "build model and transformation as they were when the checkpoint was written"
    names, there = [name for name, *_ in expected], [one["name"] for one in found]
    if set(names) != set(there):
        missing, unexpected = [n for n in names if n not in there], [n for n in there if n not in names]
        raise ValueError(f"{what}: the file is of another tree: missing {missing}, unexpected {unexpected}; {remedy}")
    leaves = []
    for (name, classes, wanted, leaf), one in zip(expected, found, strict=True):
        if (name, classes, wanted) != (one["name"], one["within"], one["form"]):
            raise ValueError(
                f"{what}: expected {name!r} within {classes}, {wanted}, got {one['name']!r} within {one['within']}, "
                f"{one['form']}, in the file; {remedy}"
            )
        if isinstance(leaf, Tensor):
            back = sorted(range(leaf.ndim), key=one["order"].__getitem__)
            written = file.get_tensor(f"{what}.{name}")
            if written.dtype != leaf.dtype:
                raise TypeError(f"{name!r} is of {written.dtype}")
            if _checksum(written) != one["crc32"]:
                raise TypeError(f"the numbers of {name!r} are not those that were written")
            # A copy: the file need not hold it where the processor wants it, which can change the rounding, too.
            held = written.to(leaf.device, copy=True)
            leaves.append(held.permute(back).expand(leaf.shape))
        else:
            leaves.append(one["value"])
    return optree.tree_unflatten(optree.tree_structure(like), leaves)


def _checksum(x: Tensor) -> int:
    """Of the bytes of a tensor on the CPU whose numbers lie one after another."""
    size = x.numel() * x.element_size()
    return zlib.crc32((ctypes.c_char * size).from_address(x.data_ptr())) if size else 0


def _classes(tree: Tree) -> list[list[str]]:
    return [[entry.type.__name__ for entry in accessor] for accessor in optree.tree_accessors(tree)]


def _table(layers: Layers) -> list[list[Any]]:
    """What says whether layers are the same, as JSON: a row for each, and for each parameter without one."""
    if not isinstance(layers, Layers):
        raise TypeError(f"layers: expected what find_layers() returned, got {type(layers).__name__}")
    rows: list[list[Any]] = []
    for layer in layers:
        bias = None if layer.bias is None else layer.bias.path
        weight = [layer.weight.path, list(layer.weight.shape)]
        rows.append([layer.name, layer.kind, *weight, bias, layer.d_in, layer.d_out, layer.groups, layer.uses])
    return rows + [[p.path, "not covered", p.path, list(p.shape)] for p, _ in layers.uncovered]


def _check_layers(expected: list[list[Any]], found: list[list[Any]] | None) -> None:
    if found is None:
        raise ValueError("layers: the file has none; pass layers to save(), or none to load()")
    for wanted, there in zip_longest(expected, found):
        if wanted != there:
            raise ValueError(
                f"layers: expected {wanted}, got {there} in the file, where a row is name, kind, weight, shape, bias, "
                "sizes of A and B, groups, uses; load into the model whose checkpoint it is"
            )


def _check_version(found: dict[str, Any], path: str | os.PathLike[str]) -> None:
    wrote, here = str(found.get("version")), __version__
    if found.get("format") != FORMAT or wrote.split(".")[:2] != here.split(".")[:2]:
        raise ValueError(
            f"path: expected a checkpoint of lrkfac {'.'.join(here.split('.')[:2])} in format {FORMAT}, got one of "
            f"lrkfac {wrote} in format {found.get('format')}: {str(path)!r}; read it with that version"
        )


def _force(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "safetensors: checkpoints need it, and it is not installed; python -m pip install 'lrkfac[checkpoint]'"
        ) from error
    return safetensors
