"""Which rule is each function's, and the mode that applies it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from lrkfac.core.base.private_torch import is_inside_function
from lrkfac.core.layers import jet_rules as rules
from lrkfac.core.layers.jets import Traced, holds_hidden, holds_jet, lifted, lowered

WITHOUT_DERIVATIVES = (
    "size", "dim", "ndimension", "numel", "nelement", "__len__", "is_floating_point", "is_complex", "element_size",
    "stride", "is_contiguous", "get_device", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
    "new_full", "new_tensor", "detach", "sign", "floor", "ceil", "round", "isnan", "isfinite", "isinf",
    "argmax", "argmin", "gt", "ge", "lt", "le", "eq", "ne", "__gt__", "__ge__", "__lt__", "__le__", "__eq__", "__ne__",
)  # fmt: skip

ATTRIBUTES_WITHOUT_DERIVATIVES = (
    "shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_sparse", "is_quantized", "itemsize",
)  # fmt: skip

OF_ROWS = (
    "t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "reshape", "view", "flatten",
    "unflatten", "squeeze", "unsqueeze", "contiguous", "chunk", "split", "narrow", "select", "unbind", "ravel",
    "__getitem__", "sum", "mean", "cumsum", "nansum", "diff", "trace", "expand", "expand_as", "broadcast_to", "repeat",
    "tile", "repeat_interleave", "roll", "flip", "clone", "to", "double", "float", "type_as", "view_as", "reshape_as",
    "neg", "negative", "__neg__", "positive", "__pos__", "index_select", "gather", "take_along_dim", "diagonal", "diag",
    "tril", "triu", "tensor_split", "hsplit", "vsplit",
)  # fmt: skip

JOINED = ("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack")

ELEMENTWISE = (
    "tanh", "sin", "cos", "tan", "exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sqrt", "rsqrt", "sigmoid",
    "sinh", "cosh", "asin", "acos", "atan", "arcsin", "arccos", "arctan", "asinh", "acosh", "atanh", "arcsinh",
    "arccosh", "arctanh", "erf", "erfc", "square", "reciprocal", "abs", "absolute", "__abs__", "relu", "pow", "__pow__",
    "__rpow__", "float_power", "sinc", "clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "atan2",
    "arctan2", "hypot", "logaddexp", "xlogy", "celu", "selu", "deg2rad", "rad2deg", "special_expit", "logit", "lgamma",
)  # fmt: skip

ACTIVATIONS = (
    "gelu", "silu", "softplus", "elu", "selu", "celu", "mish", "logsigmoid", "tanh", "sigmoid", "relu", "relu6",
    "leaky_relu", "hardtanh", "hardswish", "softsign", "tanhshrink", "softshrink", "hardshrink",
)  # fmt: skip

SMOOTH = (
    "softmax", "log_softmax", "logsumexp", "norm", "prod", "cumprod", "var", "std", "amax", "amin", "bmm", "dot",
    "outer", "inner", "cross", "cosine_similarity",
)  # fmt: skip


def _named(names: Iterable[str], *places: Any) -> Iterator[Callable[..., Any]]:
    """Yield the functions of these names, where there are such."""
    for place in places:
        yield from [getattr(place, name) for name in names if hasattr(place, name)]


_DUNDER_ADD = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_DUNDER_MUL = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
_DUNDER_DIV = (torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide)

RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys(_named(WITHOUT_DERIVATIVES, torch, Tensor), rules.of_values),
    **{getattr(Tensor, name).__get__: rules.of_values for name in ATTRIBUTES_WITHOUT_DERIVATIVES},
    **dict.fromkeys(_named(OF_ROWS, torch, Tensor), rules.of_rows),
    **{getattr(Tensor, name).__get__: rules.of_rows for name in ("T", "mT")},
    **dict.fromkeys(_named(JOINED, torch), rules.joined),
    **dict.fromkeys((torch.where, Tensor.where), rules.chosen),
    **dict.fromkeys(_named(ELEMENTWISE, torch, Tensor), rules.elementwise),
    **dict.fromkeys(_named(ACTIVATIONS, F), rules.elementwise),
    **dict.fromkeys(_named(SMOOTH, torch, Tensor), rules.smooth),
    **dict.fromkeys((F.softmax, F.log_softmax, F.softmin, F.normalize, F.cosine_similarity, F.glu), rules.smooth),
    **dict.fromkeys((torch.linalg.norm, torch.linalg.vector_norm, torch.linalg.cross), rules.smooth),
    **dict.fromkeys(_DUNDER_ADD, rules.added),
    **dict.fromkeys((torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__), rules.subtracted),
    **dict.fromkeys((torch.rsub, Tensor.__rsub__), rules.subtracted_from),
    **dict.fromkeys(_DUNDER_MUL, rules.multiplied),
    **dict.fromkeys((*_DUNDER_DIV, Tensor.__truediv__, Tensor.__div__), rules.divided),
    **dict.fromkeys((Tensor.__rdiv__, Tensor.__rtruediv__), rules.divided_from),
    **dict.fromkeys((torch.matmul, torch.mm, torch.mv, Tensor.matmul, Tensor.mm, Tensor.mv), rules.matrix_product),
    Tensor.__matmul__: rules.matrix_product,
    Tensor.__rmatmul__: rules.reversed_matrix_product,
    **dict.fromkeys((torch.addmm, Tensor.addmm), rules.affine_product),
    torch.einsum: rules.einsum,
    F.linear: rules.linear,
    F.layer_norm: rules.normalized,
    F.rms_norm: rules.rms_normalized,
}

RULES_BY_NAME = {
    func.__name__: rule for func, rule in RULES.items() if getattr(func, "__name__", "__get__") != "__get__"
}
"""The rules as the compiler finds them, to which a function that is written in Python is another than the same one
among the keys. Attributes all have the name ``__get__``; the compiler shows none of them."""


class Jets(TorchFunctionMode):
    """Applies functions to jets before any other mode sees their calls; such a mode sees those on the rows.

    Without it, a mode around the network would be handed the jets, and not be active for the rows.

    Args:
        traced: The jets inside the compiler, where it grows: a list from outside, since the compiler follows no change
            of the mode's own attributes.
    """

    def __init__(self, traced: Traced) -> None:
        super().__init__()
        self.traced = traced

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        compiling = torch.compiler.is_compiling()
        if compiling or self.traced:  # the latter: the network has a compiled part
            args = tuple([lifted(self.traced, x) for x in args])
            kwargs = {name: lifted(self.traced, x) for name, x in kwargs.items()}
            if func.__name__ != "__get__" and holds_hidden((*args, *kwargs.values())):  # the compiler reads shapes
                raise ValueError(
                    f"network: expected functions that torch.compile shows, got {func.__name__} of a tensor that it "
                    "made of the points unseen; write x.t() for x.T, x.new_zeros(n) for device=x.device"
                )
        if not holds_jet((*args, *kwargs.values())):
            return func(*args, **kwargs)
        # There, no gradient by parameters would be recorded.
        if not compiling and is_inside_function():
            raise ValueError(
                "network: it applies a custom torch.autograd.Function to what depends on the points, of which no "
                "derivatives are known here; write it by torch's functions"
            )
        rule = RULES_BY_NAME.get(func.__name__) if compiling else RULES.get(func)
        if rule is None:
            name = func.__name__ if compiling else resolve_name(func) or func
            raise ValueError(
                f"network: it applies {name} to what depends on the points, of which no "
                "derivatives are known here; write it by elementwise functions, products and rearrangements, or take "
                "the derivatives by torch.func, which leaves parameters uncovered"
            )
        return lowered(self.traced, rule(func, *args, **kwargs))
