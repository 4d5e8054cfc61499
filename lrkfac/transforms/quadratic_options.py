"""Settings of the quadratic model that hardly anybody needs to change."""

from __future__ import annotations

from dataclasses import dataclass

from lrkfac.core.base.arguments import check_flag, check_integer, check_number


@dataclass(frozen=True)
class QuadraticModelOptions:
    """Say how ``scale_by_quadratic_model`` adapts its dampings ``λ`` and ``γ``, and which steps it undoes.

    All are plain numbers, fixed when a chain is made. See ``scale_by_quadratic_model`` for what happens with
    statistics, which is all that these numbers are about.

    Attributes:
        damping_decay: Factor by which a damping may change in one step, in (0, 1). With statistics, it may change by
            as much as for the steps since the last ones, ``n``: by ``damping_decay^n`` (Martens & Grosse 2015, arXiv
            1503.05671, section 6.5, where it is ``19/20``).
        max_steps: Most steps ``n`` for which one change of ``λ`` makes up, at least 1.
        damping_interval: ``λ`` changes once in this number of statistics, by as much as for all of them; at least 1. A
            step that is undone raises it immediately.
        start_steps: Additional steps for which the first change of both dampings makes up, at least 0. Initial dampings
            are a guess, and may be wrong by orders of magnitude.
        start_decay: Factor by which these become fewer with each statistics, in [0, 1). While they are more than
            ``max_steps``, a step with smaller dampings whose reduction ratio is below ``lower_threshold`` is undone,
            and its dampings with it.
        damping_share: Share of the curvature along a step, damping included, in [0, 1). Where ``λ`` makes up less than
            this times the share of noise in the slope, it does not fall: if too small to matter, it would take hundreds
            of steps to return.
        min_damping: Lower bound of both dampings, positive.
        max_damping: Upper bound of both dampings, above the lower one. Within the default bounds, no product with a
            float32 curvature underflows or overflows.
        lower_threshold: Reduction ratio below which ``λ`` rises.
        upper_threshold: Reduction ratio above which ``λ`` falls, above the lower one.
        reject: Whether a step after which the loss of its batch is higher is undone, or which is poor at the start. One
            after which that loss is not finite is undone in any case.
        rejection_factor: Factor by which an undone step raises ``λ``, above 1.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch, lrkfac
        >>> params, x = {"w": torch.zeros(3)}, torch.eye(3)
        >>> layers = lrkfac.find_layers(lambda params, x: x @ params["w"][:, None], params, x)
        >>> tx = lrkfac.adaptive_low_rank_kfac(layers, damping=1e-9, options=QuadraticModelOptions(min_damping=1e-6))
        >>> tx.init(params)[0].damping
        tensor(1.0000e-06)
    """

    damping_decay: float = 0.95
    max_steps: int = 20
    damping_interval: int = 1
    start_steps: float = 120.0
    start_decay: float = 0.5
    damping_share: float = 0.1
    min_damping: float = 1e-10
    max_damping: float = 1e8
    lower_threshold: float = 0.25
    upper_threshold: float = 0.75
    reject: bool = True
    rejection_factor: float = 4.0

    def __post_init__(self) -> None:
        check_number(self.damping_decay, "damping_decay", 0, 1, includes_low=False)
        check_integer(self.max_steps, "max_steps")
        check_integer(self.damping_interval, "damping_interval")
        check_number(self.start_steps, "start_steps", 0)
        check_number(self.start_decay, "start_decay", 0, 1)
        check_number(self.damping_share, "damping_share", 0, 1)
        check_number(self.min_damping, "min_damping", 0, includes_low=False)
        check_number(self.max_damping, "max_damping", self.min_damping, includes_low=False)
        check_number(self.lower_threshold, "lower_threshold")
        check_number(self.upper_threshold, "upper_threshold", self.lower_threshold, includes_low=False)
        check_flag(self.reject, "reject")
        check_number(self.rejection_factor, "rejection_factor", 1, includes_low=False)
