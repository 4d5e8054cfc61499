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
from lrkfac.state_dicts import from_state_dict, named, signature, state_dict
from lrkfac.version import __version__

__all__ = ["from_state_dict", "load", "save", "state_dict"]

FORMAT = 2
"""Version of the description beside the tensors; it changes with every change of that."""
KEY = "lrkfac"


def save(path: str | os.PathLike[str], params: Tree, state: Tree, layers: Layers | None = None) -> None:
    """Write parameters and state to a file of safetensors, with the structure of both trees in its metadata.

    The file is written under another name in the same folder, forced to disk, and renamed. So ``path`` holds the last
    whole checkpoint whenever the process or the machine stops; a hidden ``.<name>.*.tmp`` may be left beside it.

    Args:
        path: Of the file, by convention ``*.safetensors``. An existing file is replaced.
        params: Parameters, or any tree with them, such as ``{"params": params, "buffers": buffers, "step": 7,
            "generator": torch.get_rng_state()}``. Leaves are tensors, numbers or strings.
        state: The state of a transformation.
        layers: From ``find_layers``; its table is kept, and compared by ``load(..., layers=layers)``.

    Raises:
        ImportError: Without safetensors, the extra ``checkpoint``.
        FileNotFoundError: If there is no such folder.
        ValueError: If ``path`` is a folder, or a tensor is on the device "meta".
        TypeError: If a leaf is neither tensor, number nor string, ``layers`` no layers, or ``path`` no path; names it.

    Examples:
        >>> import tempfile, torch, lrkfac
        >>> params = {"weight": torch.ones(2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lrkfac.checkpoint.save(f"{folder}/run.safetensors", params, lrkfac.trace(0.9).init(params))
    """
    save_file = _safetensors().torch.save_file
    target = _path(path).resolve()
    check_values(params=params, state=state)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: expected a file in a folder that exists, got {str(path)!r}; make the folder")
    tensors: dict[str, Tensor] = {}
    description = {
        "format": FORMAT,
        "version": __version__,
        "layers": None if layers is None else _table(layers),
        "params": _describe("params", params, tensors),
        "state": _describe("state", state, tensors),
    }
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        save_file(tensors, temporary, metadata={KEY: json.dumps(description)})
        _force(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere, folders cannot be opened
        _force(target.parent)


def load(path: str | os.PathLike[str], params: Tree, state: Tree, layers: Layers | None = None) -> tuple[Tree, Tree]:
    """Read what ``save`` wrote into trees like ``params`` and ``state``, whose values do not matter.

    A run that resumes so is bit for bit the run that was not stopped. Each tensor has a checksum, nothing is
    unpickled, and no class is looked up by name.

    Args:
        path: Of the file.
        params: A tree like the one that was saved; tensors come to the devices of its leaves.
        state: Such as ``tx.init(params)``.
        layers: From ``find_layers``; with them, the layers in the file must be the same.

    Returns:
        ``(params, state)``.

    Raises:
        ImportError: Without safetensors, the extra ``checkpoint``.
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint or damaged, another version of lrkfac wrote it, or its layers or trees
            differ in names, classes, shapes or dtypes; says in what.
        TypeError: As ``save``.

    Examples:
        >>> import tempfile, torch, lrkfac
        >>> params, tx = {"weight": torch.ones(2)}, lrkfac.trace(0.9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lrkfac.checkpoint.save(f"{folder}/run", params, tx.init(params))
        ...     lrkfac.checkpoint.load(f"{folder}/run", {"weight": torch.zeros(2)}, tx.init(params))
        ({'weight': tensor([1., 1.])}, TraceState(trace={'weight': tensor([0., 0.])}))
    """
    safetensors = _safetensors()
    table = None if layers is None else _table(layers)
    check_values(params=params, state=state)
    named(params, "params"), named(state, "state")  # other leaves are an error before the file is read
    if not _path(path).exists():
        raise FileNotFoundError(f"path: expected a file of lrkfac.checkpoint.save, there is none: {str(path)!r}")
    damaged = (safetensors.SafetensorError, json.JSONDecodeError, LookupError, TypeError, AttributeError, RuntimeError)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            description = json.loads((file.metadata() or {})[KEY])
            _check_version(description, path)
            if table is not None:
                _check_layers(table, description["layers"])
            return _read("params", params, description["params"], file), _read(
                "state", state, description["state"], file
            )
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


def _describe(part: str, tree: Tree, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return each leaf as JSON (name, classes around it, signature, value or layout), and add its tensor to others."""
    leaves = []
    for (name, leaf), classes in zip(named(tree, part), _classes(tree), strict=True):
        entry: dict[str, Any] = {"name": name, "within": classes, "form": signature(leaf)}
        if isinstance(leaf, Tensor):
            compact, entry["order"] = _in_memory_order(leaf.detach())
            tensors[f"{part}.{name}"] = stored = compact.to("cpu", copy=True).contiguous()
            entry["crc32"] = _checksum(stored)
        else:
            entry["value"] = leaf
        leaves.append(entry)
    return leaves


def _in_memory_order(x: Tensor) -> tuple[Tensor, list[int]]:
    """Return the numbers of a tensor as they lie in memory, each once, and the order of the axes there.

    A file stores rows after rows. Rounding may depend on how a matrix lies in memory, so that is kept.
    """
    for axis, step in enumerate(x.stride()):
        if step == 0 and x.shape[axis]:
            x = x.narrow(axis, 0, 1)
    order = [axis for _, axis in sorted((-step, axis) for axis, step in enumerate(x.stride()))]
    return x.permute(order), order


def _read(part: str, like: Tree, entries: list[dict[str, Any]], file: Any) -> Tree:
    """Return a tree like another from the tensors in a file and their description."""
    expected = {name: (leaf, classes) for (name, leaf), classes in zip(named(like), _classes(like), strict=True)}
    remedy = "build model and transformation as they were when the checkpoint was written"
    names = [entry["name"] for entry in entries]
    if set(expected) != set(names):
        missing, unexpected = [n for n in expected if n not in names], [n for n in names if n not in expected]
        raise ValueError(f"{part}: the file is of another tree: missing {missing}, unexpected {unexpected}; {remedy}")
    leaves = []
    for (name, (leaf, classes)), entry in zip(expected.items(), entries, strict=True):
        if (name, classes, signature(leaf)) != (entry["name"], entry["within"], entry["form"]):
            raise ValueError(
                f"{part}: expected {name!r} within {classes}, {signature(leaf)}, got {entry['name']!r} within "
                f"{entry['within']}, {entry['form']}, in the file; {remedy}"
            )
        leaves.append(_read_tensor(part, leaf, entry, file) if isinstance(leaf, Tensor) else entry["value"])
    return optree.tree_unflatten(optree.tree_structure(like), leaves)


def _read_tensor(part: str, like: Tensor, entry: dict[str, Any], file: Any) -> Tensor:
    """Return a tensor of the file, laid out in memory as it was; raise ``TypeError`` if it is damaged."""
    name = entry["name"]
    stored = file.get_tensor(f"{part}.{name}")
    if stored.dtype != like.dtype:
        raise TypeError(f"{name!r} is of {stored.dtype}")
    if _checksum(stored) != entry["crc32"]:
        raise TypeError(f"the numbers of {name!r} are not those that were written")
    axes = sorted(range(like.ndim), key=entry["order"].__getitem__)
    # A copy: the file's memory need not be aligned as the processor wants it, which can change the rounding, too.
    return stored.to(like.device, copy=True).permute(axes).expand(like.shape)


def _checksum(x: Tensor) -> int:
    """Return the CRC-32 of the bytes of a contiguous tensor on the CPU."""
    size = x.numel() * x.element_size()
    return zlib.crc32((ctypes.c_char * size).from_address(x.data_ptr())) if size else 0


def _classes(tree: Tree) -> list[list[str]]:
    return [[entry.type.__name__ for entry in accessor] for accessor in optree.tree_accessors(tree)]


def _table(layers: Layers) -> list[list[Any]]:
    """Return a row of JSON for each layer, and for each parameter without one; equal for equal layers."""
    if not isinstance(layers, Layers):
        raise TypeError(f"layers: expected what find_layers() returned, got {type(layers).__name__}")
    rows: list[list[Any]] = []
    for layer in layers:
        bias = None if layer.bias is None else layer.bias.path
        weight = [layer.weight.path, list(layer.weight.shape)]
        rows.append([layer.name, layer.kind, *weight, bias, layer.d_in, layer.d_out, layer.groups, layer.uses])
    return rows + [[p.path, "not covered", p.path, list(p.shape)] for p, _ in layers.uncovered]


def _check_layers(expected: list[list[Any]], saved: list[list[Any]] | None) -> None:
    if saved is None:
        raise ValueError("layers: the file has none; pass layers to save(), or none to load()")
    for row, saved_row in zip_longest(expected, saved):
        if row != saved_row:
            raise ValueError(
                f"layers: expected {row}, got {saved_row} in the file, where a row is name, kind, weight, shape, bias, "
                "sizes of A and B, groups, uses; load into the model whose checkpoint it is"
            )


def _check_version(description: dict[str, Any], path: str | os.PathLike[str]) -> None:
    version, number = str(description.get("version")), description.get("format")
    supported = __version__.split(".")[:2]
    if number != FORMAT or version.split(".")[:2] != supported:
        raise ValueError(
            f"path: expected a checkpoint of lrkfac {'.'.join(supported)} in format {FORMAT}, got one of "
            f"lrkfac {version} in format {number}: {str(path)!r}; read it with that version"
        )


def _force(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "safetensors: checkpoints need it, and it is not installed; python -m pip install 'lrkfac[checkpoint]'"
        ) from error
    return safetensors
