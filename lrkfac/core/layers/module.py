"""An unmodified ``nn.Module`` as a pure function."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lrkfac.core.base.arguments import check_flag
from lrkfac.core.base.containers import described, named_entries
from lrkfac.core.base.gathering import unshard
from lrkfac.core.base.private_fsdp import casts_of_fully_shard, is_fully_sharded, unwrapped_copy
from lrkfac.core.base.private_torch import has_backward_hooks, has_old_weight_norm, iterates_spectral_norm
from lrkfac.core.base.sharding import is_flattened, is_sharded, placements, reshard
from lrkfac.core.base.tree_checks import paths
from lrkfac.core.base.types import Tree

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def from_module(module: nn.Module, buffers: bool = False, output: str | int | None = None) -> tuple[Any, ...]:
    """Return a module as a pure function ``model(params, inputs)``, and its parameters.

    The function keeps the module's present mode (``train`` or ``eval``) and copies of its buffers. Every call works
    on fresh copies of them, so BatchNorm in training mode, which changes its buffers in place, is also pure.
    Parameters share memory with those of the module, which are never changed here. Parameters that do not require a
    gradient are frozen: they are constants of the function, not entries of ``params``. Gradients of embeddings are
    dense, whatever their ``sparse``. The function can be copied, pickled and saved if the module can.

    A module under ``fully_shard`` gives the function of the module inside, on whole tensors, and its parameters as
    sharded: ``model(unshard(params), inputs)``. Frozen parameters and buffers are whole in every process.

    Examples:
        >>> import torch
        >>> model, params = from_module(torch.nn.Linear(3, 2))
        >>> {name: tuple(p.shape) for name, p in params.items()}
        {'weight': (2, 3), 'bias': (2,)}
        >>> model(params, torch.ones(5, 3)).shape
        torch.Size([5, 2])

    Args:
        module: Any module without active dropout.
        buffers: Whether the caller carries the buffers along.
        output: The entry of the module's outputs that the function returns: a name in a mapping, dataclass or
            NamedTuple, a number in a tuple or list. By default it returns them all; the likelihood then takes the entry
            ``logits`` of a container that has one.

    Returns:
        ``(model, params)`` with ``params`` a dictionary from names to tensors. ``inputs`` is one argument: a tuple is
        spread as positional, a mapping as keyword arguments, and anything else is passed as it is.

        With ``buffers=True``: ``(model, params, buffers)``, where ``model(params, (buffers, inputs))`` returns
        ``(outputs, updated buffers)``; use it with ``evaluator(..., has_aux=True)``.

    Raises:
        TypeError: If ``module`` is no module, ``output`` no name or number; in the function, if the module's outputs
            have no such entry.
        ValueError: If the module has no parameters; if a submodule draws hidden random numbers for dropout, or has
            backward hooks, as a parameter may; or if it has ``spectral_norm`` in training mode or the old
            ``weight_norm``; if it is wrapped for several processes otherwise than by ``fully_shard``, its layers
            compute with a ``DTensor`` (tensor parallelism), or ``fully_shard`` casts to another dtype.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    check_flag(buffers, "buffers")
    if output is not None and (isinstance(output, bool) or not isinstance(output, str | int)):
        raise TypeError(f"output: expected a name, a number or None, got {type(output).__name__}")
    check_sharding(module)
    _check_no_dropout(module)
    for name, part in module.named_modules():
        _check_part(name or type(module).__name__, part)
    check_no_hooks(module)
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    constants = unshard({name: p.detach() for name, p in module.named_parameters() if not p.requires_grad})
    if not params:
        raise ValueError(f"module: {type(module).__name__} has no parameters that require a gradient")
    shared = {id(x): x for x in (*module.parameters(), *module.buffers())}
    # What the module keeps of its last pass, such as attention weights, cannot be copied with its history.
    kept = [x for part in module.modules() for x in vars(part).values() if isinstance(x, Tensor) and x.grad_fn]
    shared.update({id(x): x.detach() for x in kept})
    if any(is_fully_sharded(part) for part in module.modules()):
        shared.update({id(p): _without_values(p) for p in module.parameters() if is_sharded(p)})
        frozen = unwrapped_copy(module, shared)
    else:
        frozen = copy.deepcopy(module, shared)  # the module's mode and structure, without copies of tensors
    for part in frozen.modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag):
            part.sparse = False  # torch.func cannot take sparse gradients
    copies = {name: b.detach().clone() for name, b in module.named_buffers()}
    model = ModuleFunction(frozen, constants, None if buffers else copies, output)
    return (model, params, copies) if buffers else (model, params)


@dataclass(frozen=True, eq=False)
class ModuleFunction:
    """The pure function that ``from_module`` returns.

    Attributes:
        module: The module; its own parameters and buffers are not used.
        constants: Parameters that are not trained, by name.
        buffers: Buffers at the start of each call, by name; ``None`` where the caller passes and receives them.
        output: The entry of the module's outputs that the function returns; ``None`` for all.
    """

    module: nn.Module
    constants: dict[str, Tensor]
    buffers: dict[str, Tensor] | None
    output: str | int | None = None

    def __call__(self, params: Tree, inputs: Tree) -> Any:
        """Return the module's outputs; with carried buffers, also these as the call left them."""
        if self.buffers is not None:
            return self._outputs(params, self.buffers, inputs)[0]
        buffers, inputs = inputs
        return self._outputs(params, buffers, inputs)

    def constant_paths(self, inputs: Tree) -> tuple[str, ...]:
        """Return the paths of the leaves of the inputs that are buffers, and no examples."""
        if self.buffers is not None:
            return ()
        return tuple(f"0.{path}" for path in paths(inputs[0]))

    def _outputs(self, params: Tree, buffers: dict[str, Tensor], inputs: Tree) -> tuple[Any, dict[str, Tensor]]:
        # A module may change a buffer in place or put another tensor in its place: both end in this dictionary.
        state = {**self.constants, **params, **{name: b.clone() for name, b in buffers.items()}}
        args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((inputs,), {})
        if isinstance(inputs, Mapping):
            args, kwargs = (), dict(inputs.items())
        outputs = functional_call(self.module, state, args, kwargs, strict=True)
        if self.output is not None:
            outputs = entry(outputs, self.output)
        return outputs, {name: state[name] for name in buffers}


def entry(outputs: Any, name: str | int) -> Any:
    """Return an entry of a module's outputs, by its name or number.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(name, int):
        if isinstance(outputs, tuple | list) and -len(outputs) <= name < len(outputs):
            return outputs[name]
        size = f" of length {len(outputs)}" if isinstance(outputs, tuple | list) else ""
        raise TypeError(
            f"output: expected a tuple or list with an entry {name} from the module, got "
            f"{described(outputs)}{size}; pass the number or name of one of its entries"
        )
    entries = None if isinstance(outputs, Tensor) else named_entries(outputs)
    if entries is None or entries.get(name) is None:
        raise TypeError(
            f"output: expected a container with the entry {name!r} from the module, got "
            f"{described(outputs)}; pass the number or name of one of its entries"
        )
    return entries[name]


def _check_no_dropout(module: nn.Module) -> None:
    for name, part in module.named_modules():
        probability = part.p if isinstance(part, DROPOUTS) else getattr(part, "dropout", 0.0)
        if part.training and isinstance(probability, float) and probability > 0:
            raise ValueError(
                f"module: {name or type(module).__name__} ({type(part).__name__}) draws hidden random numbers with "
                f"p={probability}; call eval() on it, set p to 0, or write the model as a function that takes "
                "the mask in its inputs"
            )


def check_no_hooks(module: nn.Module) -> None:
    """Raise ``ValueError`` if a trained parameter has a hook, which would not be called."""
    for name, p in module.named_parameters():
        if p.requires_grad and has_backward_hooks(p):
            raise ValueError(
                f"module: the parameter {name!r} has a hook (register_hook), which is not called where gradients are "
                "computed by a function; remove it, and change .grad between evaluate() and step() of the optimizer, "
                "or the gradients or updates in the loop or in a transformation, such as masked()"
            )


def _without_values(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), p.requires_grad)


def check_sharding(module: nn.Module) -> None:
    """Leave each process its part of parameters; raise ``ValueError`` if the module is no function of whole ones."""
    reshard(module)
    for name, part in module.named_modules():
        _check_part_of_sharded(name or type(module).__name__, part)


def _check_part_of_sharded(name: str, part: nn.Module) -> None:
    if isinstance(part, nn.parallel.DistributedDataParallel | nn.DataParallel) or is_flattened(part):
        raise ValueError(
            f"module: {name!r} is {type(part).__name__} over several processes or devices, whose synchronisation in "
            "hooks of backward() nothing here runs; pass the module inside, unsharded, and "
            "evaluator(..., group=torch.distributed.group.WORLD), or give LowRankKFAC the DistributedDataParallel"
        )
    for path, p in part.named_parameters(name, recurse=False):
        cut = [type(place).__name__ for place in placements(p) if not place.is_replicate()]
        if is_sharded(p) and (not is_fully_sharded(part) or cut not in ([], ["Shard"])):
            raise ValueError(
                f"module: {path!r} is a DTensor {placements(p)} that fully_shard has not made, or not alone: "
                "layers that compute with parts of their weights (tensor parallelism) are not taken; pass the module "
                "as it was before parallelize_module(), or under fully_shard alone"
            )
    casts = casts_of_fully_shard(part)
    if casts is not None and (casts.param_dtype or casts.output_dtype):
        raise ValueError(
            f"module: {name!r} is under fully_shard with {casts}, which a function of its parameters would leave out; "
            "call fully_shard without param_dtype and output_dtype, and evaluate under torch.autocast"
        )


def _check_part(name: str, part: nn.Module) -> None:
    """Raise ``ValueError`` if a module does what no pure function can."""
    if has_backward_hooks(part):
        raise ValueError(
            f"module: {name!r} has backward hooks (register_full_backward_hook), which would also see the backward "
            "passes of the statistics, of other gradients than the loss's; remove them, and change .grad between "
            "evaluate() and step(); gradients at layers are in evaluation.statistics"
        )
    if iterates_spectral_norm(part):
        raise ValueError(
            f"module: {name!r} is spectral_norm in training mode: each forward pass takes a step of its power "
            "iteration, whose vectors are constants for the gradient but not for forward derivatives; call eval() on "
            "that part, and train() and a forward pass whenever the vectors should follow the weight"
        )
    if has_old_weight_norm(part):
        raise ValueError(
            f"module: {name!r} has the old torch.nn.utils.weight_norm, by which each forward pass changes the module; "
            "use torch.nn.utils.parametrizations.weight_norm (remove_weight_norm() takes the old one off)"
        )
