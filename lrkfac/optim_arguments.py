"""The arguments of ``LowRankKFAC``: what the transformation takes, and what each group of parameters may set."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from lrkfac.chains import kfac, low_rank_kfac
from lrkfac.core.base.arguments import check_function
from lrkfac.core.base.processes import Processes, processes_of
from lrkfac.core.base.sharding import mesh_of
from lrkfac.core.layers.module import check_sharding
from lrkfac.param_groups import PER_GROUP, checked_rate, plain_rate
from lrkfac.transforms.base import GradientTransformation
from lrkfac.untuned_chains import adaptive_low_rank_kfac

READY_MADE = (low_rank_kfac, kfac, adaptive_low_rank_kfac)
"""Transformations of the package, which take gradients as lazy matrices."""


def settings_of_groups(
    transformation: Callable[..., GradientTransformation],
    lr: float | Tensor | None,
    groups: Sequence[Any] | None,
    options: Mapping[str, Any],
    optimizer: type,
) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a group that sets none, and the names of what each group sets.

    Args:
        transformation: Makes the chain.
        lr: For all groups, ``None`` where there is none, or each group has its own.
        groups: Parameters, or groups of them.
        options: For the transformation.
        optimizer: The class.

    Raises:
        TypeError: If an option is unknown, ``lr`` no number, missing or too much.
        ValueError: If ``lr`` is out of range.
    """
    check_function(transformation, "transformation", "a function that makes a GradientTransformation, such as kfac")
    _check_options(transformation, options, [name for name in _arguments_of(optimizer) if name != "options"])
    if lr is not None:
        checked_rate(lr)
    defaults = _group_defaults(transformation, plain_rate(lr), options)
    known = list(defaults)
    if lr is None and any(isinstance(group, dict) and "lr" in group for group in groups or ()):
        known = ["lr", *defaults]
    if "lr" not in known and transformation in (low_rank_kfac, kfac):
        raise TypeError("lr: missing; pass a number, or transformation=adaptive_low_rank_kfac, which needs none")
    if "lr" in known and transformation is adaptive_low_rank_kfac:
        raise TypeError("lr: adaptive_low_rank_kfac finds its own step sizes and takes none, nor does a group")
    return defaults, known


def chain_gradients(
    transformation: Callable[..., GradientTransformation], thin: bool | None, group: Any, options: Mapping[str, Any]
) -> dict[str, bool]:
    """Return the options of ``evaluator`` that say in what form a chain takes gradients."""
    scatters = transformation in (low_rank_kfac, kfac) and group is not None and options.get("owners") is not None
    # Processes gather as many rows as the first batch has, and a later one may have more.
    lazy = transformation in READY_MADE and group is None
    return {"thin": lazy if thin is None else thin, "scatter": scatters}


def fixed_options(
    transformation: Callable[..., GradientTransformation], options: Mapping[str, Any], defaults: Collection[str]
) -> dict[str, Any]:
    """Return the options that no group of parameters sets."""
    fixed = {name: value for name, value in options.items() if name not in defaults}
    if transformation in READY_MADE and fixed.get("owners") is not None:
        fixed["owners"] = processes_of(fixed["owners"], "owners")  # which can be copied, unlike groups
    return fixed


def unwrapped(module: nn.Module, group: Any, **required: Any) -> tuple[nn.Module, Processes | None]:
    """Return the module inside of a ``DistributedDataParallel``, and its processes unless others are given.

    Its own sums over processes, in hooks of ``backward()``, are not run: evaluations bring theirs. A module under
    ``fully_shard`` stays, and its processes are those of its mesh.

    Args:
        module: Of the optimizer.
        group: Of the optimizer.
        **required: Arguments that must not be ``None``.

    Raises:
        ValueError: If ``fully_shard`` has a mesh with several axes and no group is given, or processes that are not in
            the group; or as ``from_module``.
        TypeError: If ``group`` is none, ``module`` is an iterable of parameters, or a required argument is missing.
    """
    call = "LowRankKFAC(net, lrkfac.categorical(), inputs, lr=0.1), with a batch of inputs"
    if isinstance(module, Iterable) and not isinstance(module, nn.Module):
        raise TypeError(
            f"module: expected an nn.Module, got {type(module).__name__}; pass the module, not its parameters: {call}"
        )
    for name, value in required.items():
        if value is None:
            raise TypeError(f"{name}: missing; the curvature needs the likelihood and a batch of inputs: {call}")
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module, group = module.module, module.process_group if group is None else group
    elif isinstance(module, nn.Module):
        check_sharding(module)
        meshes = list(dict.fromkeys(mesh_of(p) for p in module.parameters() if mesh_of(p) is not None))
        group = _group_of_meshes(meshes, group) if meshes else group
    return module, None if group is None else processes_of(group)  # which can be copied, unlike groups


def _group_of_meshes(meshes: Sequence[Any], group: Any) -> Any:
    """Return the group of a module under ``fully_shard``: each of its processes must step by the same update."""
    whole = "the group of all processes with batches of their own, such as torch.distributed.group.WORLD"
    if group is None and len(meshes) == meshes[0].ndim == 1:
        return meshes[0]
    if group is None:
        raise ValueError(
            "group: missing, and the module is under fully_shard on a mesh with several axes, or several meshes, got "
            f"{[tuple(mesh.shape) for mesh in meshes]}; pass {whole}"
        )
    present = processes_of(group).ranks
    spread = sorted({rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()})
    missing = [rank for rank in spread if rank not in present]
    if missing:
        raise ValueError(
            f"group: expected all processes over which fully_shard has spread the module, got the ranks {present} "
            f"without {missing}, which would step by updates of their own; pass {whole}"
        )
    return group


def list_params(params: Any) -> list[Any]:
    """Return parameters, or groups of them, as a list.

    Raises:
        ValueError: If there are none.
        TypeError: If they are something else.
    """
    if not isinstance(params, Iterable) or isinstance(params, Tensor | str | Mapping):
        raise TypeError(
            f"params: expected parameters, or dictionaries of groups, in an iterable, got {type(params).__name__}"
        )
    entries = list(params)
    if not entries:
        raise ValueError("params: expected at least one parameter, got none")
    return entries


def _check_options(
    transformation: Callable[..., GradientTransformation], options: Mapping[str, Any], arguments: Collection[str]
) -> None:
    """Raise ``TypeError`` if an option is neither the optimizer's, which has taken its own, nor the transformation's.

    Args:
        transformation: Makes the chain.
        options: For it, by name.
        arguments: Names of the optimizer's arguments.
    """
    known = _arguments_of(transformation)
    if not known or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values()):
        return
    allowed = [name for name in known if name not in ("layers", "learning_rate", "lr")]
    name = getattr(transformation, "__name__", type(transformation).__name__)
    for option in options:
        if option not in allowed:
            near = get_close_matches(option, [*allowed, *arguments], n=1)
            hint = f"; did you mean {near[0]!r}" if near else ""
            if option in ("bias", "strict"):
                hint = "; it is of find_layers, so of the functional loop: from_module, find_layers, evaluator"
            raise TypeError(
                f"{option}: LowRankKFAC takes no such argument, and {name} no such option{hint}; the options of {name} "
                f"are {allowed}, the arguments of LowRankKFAC {list(arguments)}"
            )


def _arguments_of(transformation: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(transformation).parameters)
    except (TypeError, ValueError):  # not every callable has a signature
        return {}


def _group_defaults(
    transformation: Callable[..., GradientTransformation], lr: float | Tensor | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values of a group that sets none: ``lr``, and the options of ``PER_GROUP`` that the chain takes."""
    known = _arguments_of(transformation)
    values = {name: known[name].default for name in PER_GROUP if name in known} | dict(options)
    per_group = {n: values[n] for n in PER_GROUP if n in values and values[n] is not inspect.Parameter.empty}
    return per_group if lr is None else {"lr": lr, **per_group}
