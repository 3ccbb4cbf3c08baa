"""The conditioning as an axis: the time that the network is told, as a multiple of the step's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optuna.trial import BaseTrial

from ...samplers import Aligner, InputError, Plan
from ...samplers.hook_tools import train_steps
from ..space import AXES
from .steps import prepared, rounded, steps_of, within


@dataclass(frozen=True)
class ConditioningAxis:
    """Ratios of an aligner (arXiv:2310.09469) on a straight line over the steps.

    ``conditioning.first`` and ``conditioning.last`` are the ratios of the first step and the last. Ratios of 1
    everywhere, which change nothing, are no conditioning.

    Attributes:
        steps: of the plan, at least 1.
        ratios: range of both ends.
        digits: decimals of a ratio.
        name: of the axis.
    """

    steps: int
    ratios: tuple[float, float] = (0.9, 1.1)
    digits: int = 3
    name: str = "conditioning"

    @classmethod
    def of(cls, pipe: Any, base: Plan) -> ConditioningAxis:
        """The axis of a plan's number of steps.

        Raises:
            InputError: when the plan has no grid, or the process has no train steps.
        """
        steps = steps_of("conditioning", base)
        train_steps("aligner", prepared(pipe, base).process)
        return cls(steps)

    def suggest(self, trial: BaseTrial, plan: Plan) -> Plan:
        """The plan with the ratios that the trial suggests."""
        names = ("first", "last")[: self.steps]
        ratios = self._line(*(trial.suggest_float(f"{self.name}.{end}", *self.ratios) for end in names))
        part = None if set(ratios) == {1.0} else Aligner(ratios=ratios)
        return plan.model_copy(update={"conditioning": part})

    def params(self, plan: Plan) -> dict[str, Any]:
        """The ratios at both ends of a plan's aligner, 1 where it has none.

        Raises:
            InputError: when its conditioning is another one, or the ratios are not on a line within their range.
        """
        part = plan.conditioning or Aligner(ratios=(1.0,) * self.steps)
        if not isinstance(part, Aligner):
            raise InputError(f"the plan's conditioning is {part.type!r} and the {self.name} axis makes an aligner")
        if len(part.ratios) != self.steps:
            raise InputError(f"the plan has {len(part.ratios)} ratios and the {self.name} axis {self.steps}")
        tolerance = 0.5 * 10**-self.digits
        ends = {"first": part.ratios[0], "last": part.ratios[-1]} if self.steps > 1 else {"first": part.ratios[0]}
        found = {
            f"{self.name}.{end}": within(self.name, f"{end} ratio", ratio, self.ratios, tolerance)
            for end, ratio in ends.items()
        }
        made = self._line(*found.values())
        if any(abs(mine - its) > 4 * tolerance for mine, its in zip(made, part.ratios, strict=True)):
            raise InputError(f"the plan's ratios {part.ratios} are not on one line")
        return found

    def _line(self, *ends: float) -> tuple[float, ...]:
        """The ratio of each step; the ends are rounded first, so that they give the same line again."""
        first, last = rounded(ends[0], self.digits), rounded(ends[-1], self.digits)
        slope = (last - first) / max(1, self.steps - 1)
        return tuple(rounded(first + slope * index, self.digits) for index in range(self.steps))


AXES.register("conditioning")(ConditioningAxis.of)
