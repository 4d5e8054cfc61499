"""The chain's state within the ``state_dict`` of an optimizer, as hooks among those of the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lrkfac.core.base.types import Tree
from lrkfac.state_dicts import from_state_dict, state_dict

CHAIN = "chain"
"""Key of the chain's state in the state of the first parameter: torch's tools expect each entry to be a parameter's."""


class Saved(NamedTuple):
    """The additions of the optimizer to torch's own ``state_dict``.

    Attributes:
        state: The state of the chain.
        steps: Number of steps so far.
        started: The step from which the intervals of statistics count.
    """

    state: Tree
    steps: int
    started: int


def note_steps(states: Any, groups: Sequence[Mapping[str, Any]], number: int) -> None:
    """Set the number of steps in the state of each parameter: torch's tools try to initialise an optimizer without.

    Args:
        states: Of the optimizer, by parameter.
        groups: Of the optimizer.
        number: Of steps.
    """
    for group in groups:
        for parameter in group["params"]:
            states[parameter]["step"] = number
    states[groups[0]["params"][0]].setdefault(CHAIN, {})  # filled in by state_dict()


def with_chain(saved: Saved, packed: dict[str, Any]) -> dict[str, Any]:
    """Return a ``state_dict`` of torch with the chain's state in the entry of the first parameter."""
    first = packed["param_groups"][0]["params"][0]
    chain = {"state": state_dict(saved.state), "steps": saved.steps, "started": saved.started}
    states = packed["state"]
    return {**packed, "state": {**states, first: {**states.get(first, {}), CHAIN: chain}}}


class Loading:
    """Loads a ``state_dict``: a hook before torch's loading that takes the chain's part out of it.

    Torch would cast the chain's tensors to the dtype of a parameter.

    Args:
        like: A state of the chain.
        groups: Of the optimizer.
        packed: What is loaded, before hooks change it.

    Raises:
        TypeError: If it is no dictionary.
    """

    saved: Saved

    def __init__(self, like: Tree, groups: Sequence[Mapping[str, Any]], packed: Any) -> None:
        self.like, self.groups = like, groups
        if not isinstance(packed, dict):
            raise TypeError(f"state_dict: expected that of a LowRankKFAC, got {type(packed).__name__}")

    def take(self, _: Any, packed: dict[str, Any]) -> dict[str, Any]:
        """Return what torch loads; nested or, as ``torch.distributed.checkpoint`` has it, with dotted keys.

        Raises:
            ValueError: If it is of another class of optimizer, has groups of other sizes, or another chain's state.
        """
        states, loaded = packed.get("state", {}), packed.get("param_groups", ())
        first = next((name for group in loaded for name in group["params"]), None)
        entry = states.get(first, {}) if isinstance(states, Mapping) else {}
        chain = dict(_flat(entry.get(CHAIN, {}) if isinstance(entry, Mapping) else {}))
        if "steps" not in chain:
            raise ValueError("state_dict: expected that of a LowRankKFAC, got one of another optimizer")
        sizes, expected = [[len(group["params"]) for group in some] for some in (loaded, self.groups)]
        if sizes != expected:
            raise ValueError(
                f"state_dict: expected groups of {expected} parameters, got {sizes}; make the optimizer alike"
            )
        leaves = {name.removeprefix("state."): x for name, x in chain.items() if name not in ("steps", "started")}
        self.saved = Saved(from_state_dict(self.like, leaves), chain["steps"], chain.get("started", 0))
        return {**packed, "state": {**states, first: {**entry, CHAIN: {}}}}


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
