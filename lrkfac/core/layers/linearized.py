"""A model's forward derivative where inputs and outputs of some of its layers are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lrkfac.core.base.private_torch import without_checkpoints
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.description import Layers
from lrkfac.core.layers.parsers import PARSERS
from lrkfac.core.layers.tracing import Follow, Tracked, label, tracked_views


class KnownUse(NamedTuple):
    """One use of a weight.

    Attributes:
        output: What it returned.
        weight: The matrix ``[d_out, d_in]``.
        change: The change of its output with weight and bias, for the input as it was; like the output.
    """

    output: Tensor
    weight: Tensor
    change: Tensor


class Linearized(Follow):
    """Returns the known outputs with their changes in the place of calls of linear layers, which are not computed.

    It runs inside a forward derivative, in which weights and biases of these layers are constants. No use stands inside
    a transformation that the model applies, where tensors have other levels.

    Args:
        tracked: All parameters with their paths.
        uses: The use of each source.
    """

    def __init__(self, tracked: Tracked, uses: Mapping[str, KnownUse]) -> None:
        super().__init__(tracked)
        self.uses = uses

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace a call of a known use; others run."""
        parser = PARSERS.get(func)
        call = None if parser is None else parser(self.known, *args, **(kwargs or {}))
        place = None if call is None else self.place(call.weight)
        use = None if place is None else self.uses.get(label(*place))
        if call is None or use is None:
            return super().__torch_function__(func, types, args, kwargs)
        change, of_input = use.change, forward_ad.unpack_dual(call.input).tangent
        if of_input is not None:
            change = change + F.linear(of_input, use.weight).to(change.dtype)
        # A bias that is not joint with the weight, such as one of several layers, is no constant.
        of_bias = None if call.bias is None else forward_ad.unpack_dual(call.bias).tangent
        if of_bias is not None:
            change = change + of_bias.to(change.dtype)
        return forward_ad.make_dual(use.output.clone(), change)  # which the model may change in place


def run_linearized(
    model: Callable[[Tree, Tree], Any], layers: Layers, params: Tree, inputs: Tree, uses: Mapping[str, KnownUse]
) -> Any:
    """Return the model's result, with the change that comes of its inputs, free parameters and known uses."""
    own, tracked = tracked_views(layers, params)
    with without_checkpoints(), Linearized(tracked, uses):
        return model(own, inputs)
