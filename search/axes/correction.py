"""The correction as an axis: epsilon scaling, in the last step and in the ones before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optuna.trial import BaseTrial

from ...samplers import EpsilonScaling, InputError, Plan
from ..space import AXES
from .steps import rounded, within


@dataclass(frozen=True)
class CorrectionAxis:
    """Epsilon scaling (arXiv:2308.15321): ``correction.scale`` and, for two steps and more, ``correction.slope``.

    A scale of 1 with no slope, which changes nothing, is no correction.

    Attributes:
        scale: range of lambda in the last step.
        slope: range of what it grows by with each step that is left; (0, 0) is not searched.
        digits: decimals of the scale; the slope has one more.
        name: of the axis.
    """

    scale: tuple[float, float] = (0.98, 1.08)
    slope: tuple[float, float] = (0.0, 0.0)
    digits: int = 3
    name: str = "correction"

    @classmethod
    def of(cls, pipe: Any, base: Plan) -> CorrectionAxis:
        """The axis of a plan: over all its steps the slope changes lambda by 0.03 at most."""
        left = (base.nominal_steps or 1) - 1
        return cls(slope=(-0.03 / left, 0.03 / left) if left else (0.0, 0.0))

    def suggest(self, trial: BaseTrial, plan: Plan) -> Plan:
        """The plan with the epsilon scaling that the trial suggests."""
        scale = rounded(trial.suggest_float(f"{self.name}.scale", *self.scale), self.digits)
        slope = 0.0
        if self.slope[0] < self.slope[1]:
            slope = rounded(trial.suggest_float(f"{self.name}.slope", *self.slope), self.digits + 1)
        part = None if (scale, slope) == (1.0, 0.0) else EpsilonScaling(scale=scale, slope=slope)
        return plan.model_copy(update={"correction": part})

    def params(self, plan: Plan) -> dict[str, Any]:
        """Scale and slope of a plan's epsilon scaling, 1 and 0 where it has none.

        Raises:
            InputError: when its correction is another one, or outside the ranges.
        """
        part = plan.correction or EpsilonScaling(scale=1.0)
        if not isinstance(part, EpsilonScaling):
            raise InputError(f"the plan's correction is {part.type!r} and the {self.name} axis scales epsilon")
        scale = within(self.name, "scale", part.scale, self.scale, 0.5 * 10**-self.digits)
        slope = within(self.name, "slope", part.slope, self.slope, 0.05 * 10**-self.digits)
        found = {f"{self.name}.scale": scale, f"{self.name}.slope": slope}
        if self.slope[0] == self.slope[1]:
            del found[f"{self.name}.slope"]
        return found


AXES.register("correction")(CorrectionAxis.of)
