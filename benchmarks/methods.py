"""What ``time_to_loss`` compares: each rival with a written-out grid of eight settings, and ours with none."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import lrkfac
from benchmarks.muon import Muon
from benchmarks.trainers import Functional, Leaves, Setup, Trainer

Settings = dict[str, Any]

GRID_SIZE = 8
BETWEEN_REFRESHES = 10
"""Steps between renewals of SOAP's basis and Shampoo's roots, but for ``soap-1``."""
RMSPROP = 3  # pytorch-optimizer's number for grafting to the length of RMSProp's step
KFAC_LEARNING_RATE = 0.1  # the clip sets the length of most steps
MUON_IN_FLOAT32 = 1024  # the side of a matrix from which torch's Muon, in bfloat16, takes minutes a step on many CPUs
MUON_ADAM_RATE = 3e-3  # for what Muon does not train: vectors, embeddings, the output layer of the transformer


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        label: Its name in tables and pictures.
        make: ``(setup, settings) -> trainer``.
        grid: The settings that ``--grid`` tries; ours have one, without anything to choose.
        colour: Of its curve.
        dashes: Of its curve.
        missing: Why it cannot be run here; empty where it can.
        ours: Whether it is what the others are compared with.
        ranked: Whether it takes a rank.
    """

    label: str
    make: Callable[[Setup, Settings], Trainer]
    grid: tuple[Settings, ...]
    colour: str
    dashes: Any = "-"
    missing: str = ""
    ours: bool = False
    ranked: bool = False

    @property
    def curvature(self) -> bool:
        """Whether it takes statistics every so many steps."""
        return self.ranked or self.make is dense_kfac

    @property
    def settings(self) -> Settings:
        """The middle of the grid, for want of something better."""
        return self.grid[len(self.grid) // 2]


def product(**values: Iterable[Any]) -> tuple[Settings, ...]:
    """Every combination of the values."""
    return tuple(dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values()))


def optimizer(make: Callable[[list[Tensor], float], Optimizer]) -> Callable[[Setup, Settings], Trainer]:
    """A trainer by one optimizer, ``(leaves, learning rate) -> optimizer``, for all parameters."""

    def made(setup: Setup, settings: Settings) -> Trainer:
        return Leaves(setup, lambda leaves: [make(list(leaves.values()), settings["learning_rate"])], cosine(settings))

    return made


def cosine(settings: Settings) -> bool:
    """Whether the learning rate falls to zero along a cosine."""
    return settings.get("schedule") == "cosine"


def sgd(setup: Setup, settings: Settings) -> Trainer:
    """The rate is in units of the problem's, and of ``1 - momentum``: a step's limit under a constant gradient."""
    momentum = settings["momentum"]
    rate = settings["relative_rate"] * setup.problem.sgd_rate * (1 - momentum) / 0.1
    return Leaves(setup, lambda leaves: [torch.optim.SGD(leaves.values(), lr=rate, momentum=momentum, nesterov=True)])


def muon(setup: Setup, settings: Settings) -> Trainer:
    """Muon for matrices and kernels, Adam for the rest."""

    def make(leaves: dict[str, Tensor]) -> list[Optimizer]:
        names = [name for name, leaf in leaves.items() if leaf.ndim == 2 and name not in setup.problem.by_adam]
        matrices = [leaves[name] for name in names]
        rest = [leaf for name, leaf in leaves.items() if name not in names]
        rate = settings["learning_rate"]
        wide = any(x.device.type == "cpu" and max(x.shape) >= MUON_IN_FLOAT32 for x in matrices)
        return [
            Muon(matrices, rate) if wide else torch.optim.Muon(matrices, lr=rate, weight_decay=0.0),
            torch.optim.Adam(rest, lr=MUON_ADAM_RATE),
        ]

    return Leaves(setup, make, cosine(settings))


def soap(every: int) -> Callable[[Setup, Settings], Trainer]:
    """SOAP (Vyas et al. 2024, arXiv 2409.11321); its basis is renewed every so many steps."""

    def make(leaves: list[Tensor], rate: float) -> Optimizer:
        from pytorch_optimizer import SOAP

        return SOAP(leaves, lr=rate, weight_decay=0.0, precondition_frequency=every)

    return optimizer(make)


def shampoo(leaves: list[Tensor], rate: float) -> Optimizer:
    """Shampoo as Anil et al. 2020 (arXiv 2002.09018) scale it: blocks, moving averages, grafted to RMSProp's norm."""
    from pytorch_optimizer import ScalableShampoo

    return ScalableShampoo(
        leaves, lr=rate, betas=(0.9, 0.99), moving_average_for_momentum=True, nesterov=False, graft_type=RMSPROP,
        preconditioning_compute_steps=BETWEEN_REFRESHES, start_preconditioning_step=BETWEEN_REFRESHES,
    )  # fmt: skip


def dense_kfac(setup: Setup, settings: Settings) -> Trainer:
    return Functional(setup, lrkfac.kfac(setup.layers, KFAC_LEARNING_RATE, **settings))


def low_rank_kfac(setup: Setup, settings: Settings) -> Trainer:
    return Functional(setup, lrkfac.low_rank_kfac(setup.layers, KFAC_LEARNING_RATE, rank=setup.rank, **settings))


def default(setup: Setup, settings: Settings) -> Trainer:
    """Nothing but the rank is said; the learning rate falls to zero along a cosine."""
    rate = lrkfac.schedules.warmup_cosine_decay_schedule(KFAC_LEARNING_RATE, KFAC_LEARNING_RATE, 0, setup.steps)
    return Functional(setup, lrkfac.low_rank_kfac(setup.layers, rate, rank=setup.rank))


def adaptive(setup: Setup, settings: Settings) -> Trainer:
    return Functional(setup, lrkfac.adaptive_low_rank_kfac(setup.layers, rank=setup.rank))


def averaged(setup: Setup, settings: Settings) -> Trainer:
    """The same, judged by the running average of the parameters."""
    transformation = lrkfac.adaptive_low_rank_kfac(setup.layers, rank=setup.rank)
    return Functional(setup, transformation, lambda params, state: state[-1].average)


def spectral(setup: Setup, settings: Settings) -> Trainer:
    """The rate is the root mean square of a matrix's step."""
    rate = settings["learning_rate"]
    schedule = lrkfac.schedules.warmup_cosine_decay_schedule(rate, rate, 0, setup.steps) if cosine(settings) else rate
    return Functional(setup, lrkfac.spectral_kfac(setup.layers, schedule, rank=setup.rank))


def untuned_spectral(setup: Setup, settings: Settings) -> Trainer:
    """Without a learning rate, judged by the running average of the parameters."""
    transformation = lrkfac.spectral_kfac(setup.layers, rank=setup.rank)
    return Functional(setup, transformation, lambda params, state: state[-1].average)


ADAM_RATES = (1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 3e-2)
SCHEDULES = ("constant", "cosine")
KFAC_GRID = product(damping=(0.003, 0.01, 0.03, 0.1), kl_clip=(1e-3, 1e-2))

NO_MUON = "" if hasattr(torch.optim, "Muon") else "this torch has no torch.optim.Muon"
NO_PACKAGE = "" if importlib.util.find_spec("pytorch_optimizer") else "needs the package pytorch-optimizer"

METHODS: dict[str, Method] = {
    "sgd": Method(
        "SGD, Nesterov momentum", sgd, product(relative_rate=(0.1, 0.3, 1.0, 3.0), momentum=(0.9, 0.99)),
        "#666666", (0, (1, 1.2)),
    ),
    "adam": Method(
        "Adam", optimizer(lambda leaves, rate: torch.optim.Adam(leaves, lr=rate)),
        product(learning_rate=ADAM_RATES), "#E69F00", (0, (5, 1.5, 1, 1.5)),
    ),
    "adamw": Method(
        "AdamW, cosine schedule", optimizer(lambda leaves, rate: torch.optim.AdamW(leaves, lr=rate)),
        product(learning_rate=ADAM_RATES, schedule=("cosine",)), "#E69F00",
    ),
    "muon": Method(
        "Muon", muon, product(learning_rate=(0.003, 0.01, 0.03, 0.1), schedule=SCHEDULES), "#CC79A7", "-", NO_MUON,
    ),
    "soap": Method(
        "SOAP, basis every 10 steps", soap(BETWEEN_REFRESHES),
        product(learning_rate=(0.003, 0.01, 0.03, 0.1), schedule=SCHEDULES), "#56B4E9", (0, (5, 2)), NO_PACKAGE,
    ),
    "soap-1": Method(
        "SOAP, basis every step", soap(1),
        product(learning_rate=(0.003, 0.01, 0.03, 0.1), schedule=SCHEDULES), "#56B4E9", "-", NO_PACKAGE,
    ),
    "shampoo": Method(
        "Shampoo, grafted", optimizer(shampoo),
        product(learning_rate=(0.001, 0.003, 0.01, 0.03), schedule=SCHEDULES), "#0072B2", (0, (3, 1)), NO_PACKAGE,
    ),
    "kfac": Method("dense K-FAC", dense_kfac, KFAC_GRID, "#000000", (0, (5, 2))),
    "low_rank_kfac": Method("low-rank K-FAC", low_rank_kfac, KFAC_GRID, "#009E73", ranked=True),
    "spectral": Method(
        "spectral low-rank K-FAC", spectral, product(learning_rate=(0.002, 0.005, 0.01, 0.02), schedule=SCHEDULES),
        "#D55E00", (0, (1, 1.2)), ranked=True,
    ),
    "untuned_spectral": Method(
        "spectral, no rate, averaged", untuned_spectral, ({},), "#D55E00", (0, (5, 1.5, 1, 1.5)), ours=True,
        ranked=True,
    ),
    "default": Method(
        "low-rank K-FAC, defaults, cosine", default, ({},), "#009E73", (0, (5, 2)), ours=True, ranked=True,
    ),
    "adaptive": Method(
        "adaptive low-rank K-FAC", adaptive, ({},), "#D55E00", ours=True, ranked=True,
    ),
    "averaged": Method(
        "adaptive, averaged", averaged, ({},), "#D55E00", (0, (5, 2)), ours=True, ranked=True,
    ),
}  # fmt: skip
