"""The space of a search: parts of a plan that vary, and the plan that each choice makes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from optuna.trial import BaseTrial, FixedTrial

from ..samplers import InputError, Plan
from ..samplers.registry import Registry

Parameters = Mapping[str, float | int | str | bool]
"""What a trial suggests, by name."""

NOT_DONE = ("name", "tuned_for", "evidence")
"Fields of a plan that change nothing of what it does."


class Axis(Protocol):
    """A part of the plan that varies.

    An axis writes one part, or one option of it, and leaves the others. Its parameters are called by its name, a dot
    and what they say: ``grid.first``. Whatever they are, the plan that comes out is valid.
    """

    @property
    def name(self) -> str:
        """What errors, flags and parameters call it."""

    def suggest(self, trial: BaseTrial, plan: Plan) -> Plan:
        """The plan with this part as the trial suggests it."""

    def params(self, plan: Plan) -> dict[str, Any]:
        """The parameters that give this part of a plan, up to rounding.

        Raises:
            InputError: when no parameters do.
        """


MakeAxis = Callable[[Any, Plan], Axis]
"""From a pipeline and the plan that the search starts from to an axis."""

AXES: Registry[MakeAxis] = Registry("axis of the space")


@dataclass(frozen=True)
class Space:
    """All plans that a search may find.

    Attributes:
        base: the plan that everything is left of that no axis writes.
        axes: what varies, applied in this order.
    """

    base: Plan
    axes: tuple[Axis, ...]

    def __post_init__(self) -> None:
        names = [axis.name for axis in self.axes]
        if not names:
            raise InputError(f"a space has at least one axis; known: {', '.join(AXES.names())}")
        if len(set(names)) != len(names):
            raise InputError(f"the axes of a space are different ones; got {', '.join(names)}")

    @classmethod
    def of(cls, pipe: Any, base: Plan, axes: Sequence[str]) -> Space:
        """The space of some axes by name.

        Raises:
            InputError: for an unknown axis, or one that the pipeline or the plan has no use for.
        """
        return cls(base, tuple(AXES[name](pipe, base) for name in axes))

    def suggest(self, trial: BaseTrial) -> Plan:
        """The plan that a trial suggests."""
        plan = self.base.model_copy(update=dict.fromkeys(("name", "tuned_for"), None) | {"evidence": ()})
        for axis in self.axes:
            plan = axis.suggest(trial, plan)
        return plan

    def plan(self, params: Parameters) -> Plan:
        """The plan of some parameters."""
        return self.suggest(FixedTrial(dict(params)))

    def params(self, plan: Plan) -> dict[str, Any]:
        """The parameters that give a plan, up to rounding.

        Raises:
            InputError: when it is not in the space.
        """
        found: dict[str, Any] = {}
        for axis in self.axes:
            found |= axis.params(plan)
        return found


def plan_key(plan: Plan) -> str:
    """What tells plans apart that do different things: their JSON without names and measurements."""
    return json.dumps({key: value for key, value in plan.to_json().items() if key not in NOT_DONE}, sort_keys=True)
