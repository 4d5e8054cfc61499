"""Checks that a model is a pure function: it changes no outside tensor in place and draws no hidden random numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name

from lrkfac.core.base.private_torch import intercept, is_fake

DROPOUTS = (
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    F.multi_head_attention_forward,
)  # fmt: skip


def check_pure(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> None:
    """Raise before a torch call of the model that is not pure; parameters and inputs are fake tensors, no others are.

    Raises:
        ValueError: If the call would change a tensor that is not fake, such as a buffer, apply dropout, read values as
            NumPy, have a sparse gradient, or run a backward pass into ``.grad``.
    """
    for x in _changed(func, args, kwargs):
        if isinstance(x, Tensor) and not is_fake(x):
            raise ValueError(
                f"model: {resolve_name(func)} changes a tensor of shape {tuple(x.shape)} (a buffer?) that is "
                "neither a parameter nor an input in place; use from_module(), which passes copies of buffers, "
                "or pass the buffers in the inputs and return them"
            )
    if func in (Tensor.numpy, Tensor.__array__) and is_fake(args[0]):
        raise ValueError(f"model: {resolve_name(func)} reads the values of a tensor; use torch's operations")
    if func in (F.embedding, F.embedding_bag) and _bound(func, args, kwargs)["sparse"]:
        raise ValueError(
            f"model: {resolve_name(func)} with sparse=True has sparse gradients, which torch.func cannot take; pass "
            "sparse=False"
        )
    if func in (Tensor.backward, torch.autograd.backward):
        raise ValueError("model: backward() adds to .grad of tensors; use torch.autograd.grad(..., create_graph=True)")
    if func in DROPOUTS:
        arguments = _bound(func, args, kwargs)
        if arguments["training"] and arguments.get("p", arguments.get("dropout_p", 0.0)) > 0:
            raise ValueError(_hidden_numbers_message(resolve_name(func)))
    if func is F.scaled_dot_product_attention and kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) > 0:
        raise ValueError(_hidden_numbers_message(resolve_name(func)))


def without_random_numbers() -> AbstractContextManager[Any]:
    """Return a context that refuses each operation on the global random generator, whatever function called it."""
    return intercept(_check_draws_nothing)


def _check_draws_nothing(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Attention carries the tag for its dropout, at which ``check_pure`` looks.
    drawing = torch.Tag.nondeterministic_seeded in operation.tags and "attention" not in str(operation)
    if drawing and kwargs.get("generator") is None:
        raise ValueError(_hidden_numbers_message(str(operation)))
    return operation(*args, **kwargs)


def _hidden_numbers_message(name: str | None) -> str:
    return (
        f"model: {name} draws hidden random numbers; call eval() on the module, set the probability to 0, or pass "
        "what is drawn (a mask, noise) in the inputs"
    )


def _changed(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Iterable[Any]:
    """Return the tensors that a call changes, by torch's rules for names: a trailing underscore, ``out=``."""
    if func is F.batch_norm:
        arguments = _bound(func, args, kwargs)
        return [arguments["running_mean"]] if arguments["training"] else []
    name = getattr(func, "__name__", "")
    out = optree.tree_leaves(kwargs.get("out", ()))
    in_place = (name.endswith("_") and not name.startswith("__")) or name == "__setitem__" or _augmented(name)
    return [*out, *optree.tree_leaves(args[:1])] if in_place else out


def _augmented(name: str) -> bool:
    return name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__index__", "__int__")


def _bound(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments
