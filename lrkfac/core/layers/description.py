"""The static description of a model: its parameters and layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

import torch

from lrkfac.core.base.leaves import tree_leaves
from lrkfac.core.base.text import table
from lrkfac.core.base.tree_checks import paths
from lrkfac.core.base.types import Tree
from lrkfac.core.layers.placement import Placement
from lrkfac.core.layers.views import View

Treatment = Literal["expand", "reduce"]
"""The K-FAC variant for weight sharing: "expand" or "reduce" (Eschenhagen et al. 2023, arXiv 2311.00636)."""


@dataclass(frozen=True)
class Parameter:
    """One parameter's place in the parameter tree, and the part of it that a layer uses.

    Attributes:
        path: Its dotted path.
        index: Its place among ``tree_leaves(params)``.
        shape: The shape of the whole parameter.
        view: The steps from the parameter to the part of it, in the arrangement, that a layer uses.
        dtype: Its dtype when ``find_layers`` ran; not compared.
    """

    path: str
    index: int
    shape: tuple[int, ...]
    view: View = ()
    dtype: torch.dtype = field(default=torch.float32, compare=False)


@dataclass(frozen=True)
class Layer:
    """One weight of a model with the operations that use it, as static data.

    Examples:
        >>> import torch
        >>> from lrkfac import find_layers, from_module
        >>> model, params = from_module(torch.nn.Sequential(torch.nn.Linear(3, 2)))
        >>> layer = find_layers(model, params, torch.ones(5, 3))["0"]
        >>> layer.kind, layer.weight.path, layer.bias.path
        ('linear', '0.weight', '0.bias')
        >>> layer.d_in, layer.d_out  # with the bias as a fourth column
        (4, 2)

    Attributes:
        name: The weight's path without its last part (the whole path where that is not unique).
        kinds: For each use of the weight in one forward pass, the name of the layer kind.
        weight: The weight, or, for the kind ``"bias"``, the bias itself.
        bias: The bias where it is joint with the weight, else ``None``.
        d_in: Length of one input row ``a`` of one group, with the trailing 1 of a joint bias.
        d_out: Length of one output row ``s`` of one group.
        groups: Number of independent blocks (grouped convolutions); 1 elsewhere.
        options: For each use, the operation's settings.
        sites: For each use, the label of the weight or of the view of it that the operation received (for the
            kind ``"bias"`` its weight's), and the number of the call among those with this label.
        placements: For each use, where the examples are in its input and output; ``None`` where this is not known.
        mapped: Whether uses stand inside ``vmap``, within the model.
        carried: Whether the rows hold the constant input of the joint bias: it is not 1 for all of them where they are
            derivatives of the network, see ``derivatives``.
    """

    name: str
    kinds: tuple[str, ...]
    weight: Parameter
    bias: Parameter | None
    d_in: int
    d_out: int
    groups: int
    options: tuple[tuple[Any, ...], ...]
    sites: tuple[tuple[str, int], ...]
    placements: tuple[Placement | None, ...]
    mapped: bool = False
    carried: bool = False

    @property
    def appends(self) -> bool:
        """Whether the trailing 1 of a joint bias is still to be appended to the rows."""
        return self.bias is not None and not self.carried

    @property
    def kind(self) -> str:
        """The names of the kinds, each once; custom kinds by the names that they were given."""
        named = [o[0].name if kind == "custom" else kind for kind, o in zip(self.kinds, self.options, strict=True)]
        return " + ".join(dict.fromkeys(named))

    @property
    def by_example(self) -> bool:
        """Whether it is known at every use which rows belong to which example: only then has each a gradient."""
        return None not in self.placements

    @property
    def uses(self) -> int:
        """The number of uses of the weight in one forward pass."""
        return len(self.options)


@dataclass(frozen=True)
class Layers:
    """The layers of a model, as ``find_layers`` describes them: a sequence that prints as a table.

    A name picks a layer: ``layers["net.0"]``.

    Examples:
        >>> import torch
        >>> from lrkfac import find_layers
        >>> model = lambda params, x: torch.tanh(x @ params["w"].T + params["b"]) * params["scale"].exp()
        >>> params = {"w": torch.ones(2, 3), "b": torch.ones(2), "scale": torch.ones(())}
        >>> print(find_layers(model, params, torch.ones(5, 3)))
        name  kind    parameters  shape  factors   uses
        ----  ------  ----------  -----  --------  ----
        w     linear  w, b        2 x 3  A 4, B 2  1
        <BLANKLINE>
        not covered (plain gradient):
          scale (): used by torch.Tensor.exp

    Attributes:
        layers: One entry for each weight that is covered, in the order of their first use.
        uncovered: Each other parameter with the reason why no layer covers it.
        parameters: All parameters, in the order of ``tree_leaves(params)``.
        tree: The parameter tree with each parameter's ``Parameter`` as its leaf.
        custom: The custom layer kinds.
        batch_axes: The axis of the batch of each leaf of the inputs that has one, by its path; ``None`` if unknown.
        independent: Whether the outputs of each example depend on no other example; ``None`` if unknown.
        single: Whether the leading axis of the outputs has one entry for each example; else several terms of one
            example, such as the positions of a sequence, stand along it.
        own: Whether heads have different numbers of examples, each its own, along the leading axis of its outputs.
        autograd: Whether derivatives are taken by ``torch.autograd``: the model does what ``torch.func`` refuses.
        alone: Whether outputs of an example are the same in a batch of its own, to which ``vmap`` takes the model; it
            is known where there are layers of the kind "jacobian".
    """

    layers: tuple[Layer, ...]
    uncovered: tuple[tuple[Parameter, str], ...]
    parameters: tuple[Parameter, ...]
    tree: Tree
    custom: tuple[Any, ...] = ()
    batch_axes: tuple[tuple[str, int], ...] | None = None
    independent: bool | None = True
    single: bool = True
    own: bool = False
    autograd: bool = False
    alone: bool = False

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> Layer:
        by_name = {layer.name: layer for layer in self.layers}
        if name not in by_name:
            near = get_close_matches(str(name), by_name, n=3, cutoff=0.3) or list(by_name)
            raise KeyError(f"layers: no layer {name!r}; the nearest are {near}")
        return by_name[name]

    @property
    def covered(self) -> frozenset[int]:
        """The indices of the parameters that belong to a layer."""
        both = [p for layer in self.layers for p in (layer.weight, layer.bias)]
        return frozenset(p.index for p in both if p is not None)

    @property
    def jacobians(self) -> tuple[Layer, ...]:
        """The layers that are whole parameters, known by the gradients of single examples."""
        return tuple([layer for layer in self.layers if "jacobian" in layer.kinds])

    @property
    def followed(self) -> Layers:
        """The others, whose operations are captured."""
        left = tuple([layer for layer in self.layers if "jacobian" not in layer.kinds])
        return self if len(left) == len(self.layers) else replace(self, layers=left)

    def examples(self, inputs: Tree) -> int | None:
        """Return the number of examples of a batch; ``None`` where it is not known which axis holds them."""
        axes = dict(self.batch_axes or ())
        for path, leaf in zip(paths(inputs), tree_leaves(inputs), strict=True):
            if path in axes:
                return int(leaf.shape[axes[path]])
        return None

    @property
    def sources(self) -> frozenset[str]:
        """The labels of the weights and views at whose uses something is captured."""
        return frozenset(label for layer in self.layers for label, _ in layer.sites)

    @property
    def mapped(self) -> frozenset[str]:
        """The labels among ``sources`` whose uses stand inside ``vmap``."""
        return frozenset(label for layer in self.layers if layer.mapped for label, _ in layer.sites)

    def facts(self) -> dict[str, str]:
        """Return each layer's kinds and factors, and why other parameters have none, in words by name."""
        layers = {
            f"layer {one.name}": f"{one.kind} of {one.uses} uses, {one.groups} groups, A {one.d_in}, B {one.d_out}"
            for one in self.layers
        }
        whole = {"independent examples": str(self.independent), "single outputs": str(self.single)}
        return layers | {f"parameter {p.path}": reason for p, reason in self.uncovered} | whole

    def __str__(self) -> str:
        rows = [("name", "kind", "parameters", "shape", "factors", "uses")]
        for layer in self.layers:
            paths = layer.weight.path if layer.bias is None else f"{layer.weight.path}, {layer.bias.path}"
            blocks = f"{layer.groups} x " if layer.groups > 1 else ""
            factors = f"{blocks}A {layer.d_in}, B {layer.d_out}"
            shape = " x ".join(map(str, layer.weight.shape))
            if layer.name != layer.weight.path and layer.name.startswith(layer.weight.path):
                paths = layer.name
            rows.append((layer.name, layer.kind, paths, shape, factors, str(layer.uses)))
        lines = [table(rows)]
        if self.uncovered:
            lines += ["", "not covered (plain gradient):"]
            lines += [f"  {p.path} {tuple(p.shape)}: {reason}" for p, reason in self.uncovered]
            if any("derivative" in reason or "torch.autograd" in reason for _, reason in self.uncovered):
                lines += ["", 'derivatives: laplacian() and derivatives() keep layers, uncovered="jacobian" covers all']
        else:
            lines += ["", "every parameter is covered"]
        if self.independent is None:
            lines += ["", "it is not known whether outputs of one example depend on others", REFUSED]
        elif not self.independent:
            lines += ["", "outputs of one example depend on others, as with BatchNorm in training mode", REFUSED]
        elif not self.single:
            lines += ["", "outputs of one example stand at several places of the leading axis"]
        if self.jacobians and not self.alone:
            lines += [
                "",
                "jacobian: examples go back through the whole batch one by one, since the model cannot be mapped",
            ]
        return "\n".join(lines)


REFUSED = 'training needs no change; uncovered="jacobian", full() and layer_wise() need single examples and are refused'


def check_layers(value: Any) -> Layers:
    """Return ``value``; raise unless ``find_layers`` made it."""
    if not isinstance(value, Layers):
        raise TypeError(f"layers: expected what find_layers() returned, got {type(value).__name__}")
    return value
