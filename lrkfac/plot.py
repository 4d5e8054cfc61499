"""Pictures of diagnoses and spectra by matplotlib (extra ``plot``).

Each function returns a ``matplotlib.figure.Figure``, to be saved: ``spectra(diagnosis).savefig("spectra.png")``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lrkfac.core.base.arguments import check_number
from lrkfac.core.linalg.density import SpectralDensity
from lrkfac.diagnostics import Diagnosis
from lrkfac.figures import FEW, colours_of, new_figure, tidy

FLOOR = 1e-7
"""Eigenvalues below this share of the largest are rounding, and not drawn."""
OF_CHAIN = {
    "damping": "damping $\\lambda$ of the model",
    "factor_damping": "damping $\\gamma$ of the factors",
    "hyperparameters/damping": "damping",
}
OF_STEPS = {
    "learning_rate": "learning rate $\\alpha$",
    "momentum": "momentum $\\mu$",
    "hyperparameters/learning_rate": "learning rate",
    "hyperparameters/momentum": "momentum",
}


def spectra(diagnosis: Diagnosis) -> Any:
    """Draw the eigenvalues of each layer's factors against their number, both axes logarithmic.

    Eigenvalues below 1e-7 of the largest are not drawn.

    Args:
        diagnosis: From ``diagnose``.

    Returns:
        A ``matplotlib.figure.Figure`` with a panel for each kind of factor.

    Raises:
        ImportError: Without matplotlib.
        TypeError: If it is no ``Diagnosis``.

    Examples:
        >>> import torch, lrkfac
        >>> model, params = lrkfac.from_module(torch.nn.Linear(6, 3))
        >>> inputs, targets = torch.randn(20, 6), torch.randint(3, (20,))
        >>> layers = lrkfac.find_layers(model, params, inputs)
        >>> tx = lrkfac.low_rank_kfac(layers, 0.1, rank=2)
        >>> evaluation = lrkfac.evaluator(model, lrkfac.categorical(), layers)(params, inputs, targets)
        >>> _, state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
        >>> figure = lrkfac.plot.spectra(lrkfac.diagnose(state, layers))
        >>> [axis.get_title() for axis in figure.axes]
        ['input factors A', 'output-gradient factors B']
    """
    return _by_factor(diagnosis, "eigenvalue", lambda values, total: values, logarithmic=True)


def captured(diagnosis: Diagnosis) -> Any:
    """Draw the share of the trace that the first ``r`` eigenpairs of each layer's factors capture, against ``r``.

    Args:
        diagnosis: From ``diagnose``.

    Returns:
        A ``matplotlib.figure.Figure`` with a panel for each kind of factor.

    Raises:
        ImportError: Without matplotlib.
        TypeError: If it is no ``Diagnosis``.

    Examples:
        >>> import torch, lrkfac
        >>> model, params = lrkfac.from_module(torch.nn.Linear(8, 4))
        >>> inputs, targets = torch.randn(20, 8), torch.randint(4, (20,))
        >>> layers = lrkfac.find_layers(model, params, inputs)
        >>> tx = lrkfac.low_rank_kfac(layers, 0.1, rank=2)
        >>> evaluation = lrkfac.evaluator(model, lrkfac.categorical(), layers)(params, inputs, targets)
        >>> _, state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
        >>> figure = lrkfac.plot.captured(lrkfac.diagnose(state, layers))
        >>> figure.axes[0].get_ylabel()
        'captured trace [%]'
    """

    def shares(values: Tensor, total: Tensor) -> Tensor:
        return 100 * values.cumsum(dim=0) / total.clamp(min=torch.finfo(total.dtype).tiny)

    return _by_factor(diagnosis, "captured trace [%]", shares, logarithmic=False)


def history(diagnoses: Sequence[Diagnosis], steps: Sequence[int] | None = None) -> Any:
    """Draw dampings, step sizes and captured trace over the steps of a run.

    Dampings and step sizes are the chain's where its state has them. Otherwise they are the dampings of the factors and
    the lengths of the updates, each as median and range over layers.

    Args:
        diagnoses: From ``diagnose``, one for each of some steps.
        steps: Numbers of these steps; by default 0, 1, …

    Returns:
        A ``matplotlib.figure.Figure`` with three panels.

    Raises:
        ImportError: Without matplotlib.
        ValueError: If there is none, or the lengths differ.
        TypeError: If one is no ``Diagnosis``.

    Examples:
        >>> import torch, lrkfac
        >>> model, params = lrkfac.from_module(torch.nn.Linear(5, 2))
        >>> inputs, targets = torch.randn(30, 5), torch.randint(2, (30,))
        >>> layers = lrkfac.find_layers(model, params, inputs)
        >>> tx = lrkfac.low_rank_kfac(layers, 0.1, rank=2)
        >>> evaluation = lrkfac.evaluator(model, lrkfac.categorical(), layers)(params, inputs, targets)
        >>> _, state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
        >>> figure = lrkfac.plot.history([lrkfac.diagnose(state, layers)] * 3, steps=[0, 10, 20])
        >>> [axis.get_ylabel() for axis in figure.axes]
        ['damping', 'step size', 'captured trace [%]']
    """
    for diagnosis in diagnoses:
        _check(diagnosis)
    numbers = list(range(len(diagnoses)) if steps is None else steps)
    if not diagnoses or len(numbers) != len(diagnoses):
        raise ValueError(
            f"diagnoses: expected at least one, and as many as steps, got {len(diagnoses)} and {len(numbers)}"
        )
    figure = new_figure(9.5, 2.9)
    damping, size, share = figure.subplots(1, 3)
    if not _curves(damping, numbers, diagnoses, OF_CHAIN):
        _ranges(damping, numbers, diagnoses, "damping")
    if not _curves(size, numbers, diagnoses, OF_STEPS):
        _ranges(size, numbers, diagnoses, "update_norm")
    _ranges(share, numbers, diagnoses, "captured", scale=100)
    labels = {damping: "damping", size: "step size", share: "captured trace [%]"}
    for axis, label in labels.items():
        axis.set(xlabel="step", ylabel=label)
        axis.set_yscale("linear" if axis is share else "log")
        tidy(axis)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    share.set_ylim(0, 103)
    return figure


def density(found: SpectralDensity, width: float = 0.1) -> Any:
    """Draw the density of eigenvalues over their logarithm, as the number of eigenvalues in a decade.

    Each node is a Gaussian; positive and negative ones have a curve each. The title counts those that are below 1e-7 of
    the largest, and not drawn.

    Args:
        found: From ``lrkfac.curvature.spectral_density``.
        width: Standard deviation of the Gaussians, in decades.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ImportError: Without matplotlib.
        TypeError: If ``found`` is no ``SpectralDensity``.
        ValueError: If ``width`` is not above 0, or all eigenvalues are zero.

    Examples:
        >>> import torch, lrkfac
        >>> M = lrkfac.linalg.Diagonal(torch.logspace(-3, 0, 100))
        >>> found = lrkfac.curvature.spectral_density(M, 5, 20, torch.Generator().manual_seed(0))
        >>> lrkfac.plot.density(found).axes[0].get_xlabel()
        'eigenvalue'
    """
    if not isinstance(found, SpectralDensity):
        raise TypeError(f"found: expected what spectral_density() returned, got {type(found).__name__}")
    check_number(width, "width", 0, includes_low=False)
    nodes, weights = (x.detach().cpu().double() for x in found[:2])
    weights = weights * int(found.dimension) / len(weights)
    shown = nodes.abs() > FLOOR * nodes.abs().amax()
    if not bool(shown.any()):
        raise ValueError("found: expected some eigenvalue other than 0, got none")
    figure = new_figure(6.5, 3.6)
    axis, drawn = figure.subplots(), nodes[shown].abs().log10()
    points = torch.linspace(float(drawn.amin()) - 4 * width, float(drawn.amax()) + 4 * width, 600, dtype=torch.float64)
    for sign, name in ((1, "positive"), (-1, "negative")):
        which = shown & (sign * nodes > 0)
        bumps = torch.exp(-(((points[:, None] - nodes[which].abs().log10()) / width) ** 2) / 2)
        if bool(which.any()):
            axis.plot((10**points).tolist(), (bumps @ weights[which] / (width * 2.5066)).tolist(), lw=1.4, label=name)
    axis.set(xscale="log", yscale="log", xlabel="eigenvalue", ylabel="eigenvalues in a decade", ylim=(0.3, None))
    rest = float(weights[~shown].sum())
    axis.set_title(f"{int(found.dimension)} eigenvalues, {rest:.0f} of them below {FLOOR:g} of the largest", fontsize=9)
    tidy(axis)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _by_factor(diagnosis: Diagnosis, label: str, of: Callable[[Tensor, Tensor], Tensor], logarithmic: bool) -> Any:
    """Draw a panel for each kind of factor, or for blocks, with a curve for each layer."""
    _check(diagnosis)
    figure = new_figure(9.5, 3.8)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    layers = diagnosis.layers.values()
    parts = [part for part in ("A", "B", "F") if any(part in layer.eigenvalues for layer in layers)]
    titles = {"A": "input factors A", "B": "output-gradient factors B", "F": "blocks F"}
    names = [name or "all layers" for name in diagnosis.layers]
    colours = colours_of(len(names))
    axes = figure.subplots(1, len(parts), squeeze=False, sharey=False)[0]
    for axis, part in zip(axes, parts, strict=True):
        for name, colour, layer in zip(names, colours, layers, strict=True):
            if part in layer.eigenvalues:
                values = layer.eigenvalues[part].detach().cpu()
                y = of(values, values.sum() + layer.rest[part].detach().cpu())
                y = y[y > FLOOR * values.amax()] if logarithmic else y
                axis.plot(range(1, len(y) + 1), y.tolist(), color=colour, label=name, marker=".", ms=4, lw=1.3)
        axis.set(title=titles[part], xlabel="number of eigenpairs", ylabel=label, xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        if logarithmic:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 103)
        tidy(axis)
    if len(names) <= FEW:
        lines = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False, title="layer", fontsize=8)
    else:
        _depth_bar(figure, axes, names)
    return figure


def _depth_bar(figure: Any, axes: Any, names: list[str]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(ScalarMappable(Normalize(1, len(names)), "viridis"), ax=list(axes), pad=0.02)
    bar.set_label("layer, in the order of use")
    ends = (1, len(names))
    bar.set_ticks(ends, labels=[f"{i}: {names[i - 1]}" for i in ends])


def _curves(axis: Any, steps: list[int], diagnoses: Sequence[Diagnosis], names: dict[str, str]) -> bool:
    """Draw those of some numbers that every chain state has, and return whether there was one."""
    drawn = False
    for name, label in names.items():
        if all(name in diagnosis.chain for diagnosis in diagnoses):
            values = [abs(float(diagnosis.chain[name])) or float("nan") for diagnosis in diagnoses]
            axis.plot(steps, values, label=label, lw=1.4)
            drawn = True
    return drawn


def _ranges(axis: Any, steps: list[int], diagnoses: Sequence[Diagnosis], quantity: str, scale: float = 1) -> None:
    """Draw median and range over layers of a quantity, for each kind of factor."""
    for part, colour in {"A": "tab:blue", "B": "tab:orange", "F": "tab:green"}.items():
        values = [
            [scale * float(x.numbers[part][quantity]) for x in d.layers.values() if quantity in x.numbers.get(part, {})]
            for d in diagnoses
        ]
        if all(values):
            medians = [sorted(of_layers)[len(of_layers) // 2] for of_layers in values]
            label = {"A": "A", "B": "B", "F": "update norm" if quantity == "update_norm" else "blocks"}[part]
            several = "and range over layers" if len(values[0]) > 1 else ""
            axis.plot(steps, medians, color=colour, lw=1.4, label=f"{label}: median {several}" if several else label)
            axis.fill_between(steps, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, lw=0)


def _check(diagnosis: Any) -> None:
    if not isinstance(diagnosis, Diagnosis):
        raise TypeError(f"diagnosis: expected what diagnose() returned, got {type(diagnosis).__name__}")
