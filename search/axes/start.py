"""The start as an axis: the base plan's, or the pipeline's own noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optuna.trial import BaseTrial

from ...samplers import InputError, Part, Plan
from ..space import AXES


@dataclass(frozen=True)
class StartAxis:
    """Whether sampling starts from a given start, such as analytic-init: the parameter ``start.on``.

    Attributes:
        part: the start.
        name: of the axis.
    """

    part: Part
    name: str = "start"

    @classmethod
    def of(cls, pipe: Any, base: Plan) -> StartAxis:
        """The axis of a plan's start.

        Raises:
            InputError: when the plan has none.
        """
        if base.start is None:
            raise InputError(
                "the start axis turns the plan's start on and off; give the plan a start part, such as analytic-init"
            )
        return cls(base.start)

    def suggest(self, trial: BaseTrial, plan: Plan) -> Plan:
        """The plan with the start on or off."""
        on = trial.suggest_categorical(f"{self.name}.on", [False, True])
        return plan.model_copy(update={"start": self.part if on else None})

    def params(self, plan: Plan) -> dict[str, Any]:
        """Whether a plan has the start.

        Raises:
            InputError: when it has another one.
        """
        if plan.start not in (None, self.part):
            raise InputError(f"the plan's start {plan.start!r} is not that of the {self.name} axis, {self.part!r}")
        return {f"{self.name}.on": plan.start is not None}


AXES.register("start")(StartAxis.of)
