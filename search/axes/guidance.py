"""Guidance as an axis: a scale, how it changes over the steps, and the window in which it is on."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import BaseTrial

from ...samplers import ConstantGuidance, GuidanceSchedule, InputError, Plan
from ..space import AXES
from .steps import call_options, rounded, steps_of, within


@dataclass(frozen=True)
class GuidanceAxis:
    """Scales of guidance on a straight line from the first guided step to the last.

    ``guidance.first`` and ``guidance.last`` are the scales at both ends; where ``changes`` is off there is
    ``guidance.scale`` instead. ``guidance.start`` and ``guidance.stop`` say in which steps guidance is on, at least
    one: the fraction of the steps before the first guided one (of those that can be), and the fraction of the steps
    after it that are guided too.

    Scales nearer than ``off`` to 1 are 1, where the unconditional branch is not evaluated. One scale for all steps is
    written as a constant one, no guidance as a constant 1, and all else as a list of scales.

    Attributes:
        default: scale of a plan without guidance, the pipeline's own.
        scales: range of the scales, at least 1.
        steps: of the plan; None searches one scale alone.
        changes: whether the scale changes over the steps.
        window: whether guidance is on in some steps only.
        true_cfg: the pipeline takes its scale as ``true_cfg_scale``.
        rescale: the pipeline's ``guidance_rescale``, kept.
        off: distance from 1 that counts as none.
        name: of the axis.
    """

    default: float
    scales: tuple[float, float]
    steps: int | None = None
    changes: bool = True
    window: bool = True
    true_cfg: bool = False
    rescale: float | None = None
    off: float = 0.05
    name: str = "guidance"

    def __post_init__(self) -> None:
        least = 1 + self.off if self.true_cfg else 1.0
        if not least <= self.scales[0] < self.scales[1]:
            raise InputError(f"guidance scales range from {least:g} at least to something greater; got {self.scales}")
        if self.steps is None and (self.changes or self.window):
            raise InputError("guidance that changes over the steps needs their number; give the plan a grid part")

    @classmethod
    def of(cls, pipe: Any, base: Plan, *, changes: bool = True, window: bool = True) -> GuidanceAxis:
        """The axis of a plan, with scales from none up to as far above the plan's as that is above none, at least 3.

        Raises:
            InputError: when the pipeline does not guide by two branches, or the plan has no grid and the guidance
                changes over the steps.
        """
        options = call_options(pipe)
        true_cfg = "true_cfg_scale" in options
        key = "true_cfg_scale" if true_cfg else "guidance_scale"
        if key not in options:
            raise InputError(f"{type(pipe).__name__} takes no guidance_scale; leave the guidance axis out")
        default = inspect.signature(type(pipe).__call__).parameters[key].default
        own = float(default) if isinstance(default, int | float) else 1.0
        part, steps = base.guidance, steps_of("guidance", base) if changes or window else None
        scale = getattr(part, "scale", own)
        greatest = max(scale) if isinstance(scale, Sequence) else scale
        low = 1.05 if true_cfg else 1.0
        return cls(
            own,
            (low, max(3.0, 2 * greatest - 1)),
            steps,
            changes and steps != 1,
            window and steps != 1,
            true_cfg,
            getattr(part, "rescale", None),
        )

    def suggest(self, trial: BaseTrial, plan: Plan) -> Plan:
        """The plan with the guidance that the trial suggests."""
        ends = ("first", "last") if self.changes else ("scale", "scale")
        first, last = (trial.suggest_float(f"{self.name}.{end}", *self.scales) for end in ends)
        steps = self.steps or 1
        start, stop = 0, steps
        if self.window:
            start = round(trial.suggest_float(f"{self.name}.start", 0.0, 1.0) * (steps - 1))
            stop = start + 1 + round(trial.suggest_float(f"{self.name}.stop", 0.0, 1.0) * (steps - start - 1))
        scales = self._scales(first, last, start, stop)
        return plan.model_copy(update={"guidance": self._part(scales)})

    def params(self, plan: Plan) -> dict[str, Any]:
        """The parameters of a plan's guidance; without any, of the pipeline's own scale.

        Raises:
            InputError: when its scales are not on one line within one window, not in range, or not for as many steps.
        """
        scales = self._given(plan)
        steps = len(scales)
        guided = [index for index, scale in enumerate(scales) if scale > 1]
        start, stop = (guided[0], guided[-1] + 1) if guided else (0, steps)
        first, last = (
            within(self.name, "guidance scale", scales[index], self.scales, 0.005) for index in (start, stop - 1)
        )
        made = self._scales(first, last, start, stop)
        if any(abs(mine - its) > 0.02 for mine, its in zip(made, scales, strict=True)):
            raise InputError(f"the plan's guidance scales {scales} are not on one line within one window")
        if not self.changes and first != last:
            raise InputError(f"the plan's guidance changes over the steps and the {self.name} axis has one scale")
        if not self.window and stop - start < steps:
            raise InputError(f"the plan's guidance is off in some steps and the {self.name} axis is on in all")
        found = {"first": first, "last": last} if self.changes else {"scale": first}
        if self.window:
            after = steps - start - 1
            found |= {"start": start / max(1, steps - 1), "stop": (stop - start - 1) / after if after else 1.0}
        return {f"{self.name}.{what}": value for what, value in found.items()}

    def _scales(self, first: float, last: float, start: int, stop: int) -> tuple[float, ...]:
        """The scale of each step: a line from ``first`` to ``last`` in steps start <= i < stop, and 1 elsewhere.

        Ends that are off narrow the window first, so that the line is one between the scales that are written.
        """
        window = start, stop
        on = [index for index in range(*window) if _on_line(first, last, *window, index) >= 1 + self.off]
        if not on:
            return (1.0,) * (self.steps or 1)
        start, stop = on[0], on[-1] + 1
        first, last = (rounded(_on_line(first, last, *window, end), 2) for end in (start, stop - 1))
        return tuple(
            rounded(_on_line(first, last, start, stop, index), 2) if start <= index < stop else 1.0
            for index in range(self.steps or 1)
        )

    def _part(self, scales: tuple[float, ...]) -> ConstantGuidance | GuidanceSchedule:
        if len(set(scales)) > 1:
            return GuidanceSchedule(scale=scales, rescale=self.rescale)
        kind = GuidanceSchedule if self.true_cfg else ConstantGuidance
        return kind(scale=scales[0], rescale=self.rescale)

    def _given(self, plan: Plan) -> tuple[float, ...]:
        """The scales of a plan's steps, off as 1."""
        part = plan.guidance or ConstantGuidance(scale=self.default, rescale=self.rescale)
        steps = self.steps or 1
        if isinstance(part, ConstantGuidance | GuidanceSchedule) and part.rescale != self.rescale:
            raise InputError(f"the plan's rescale is {part.rescale} and that of the {self.name} axis {self.rescale}")
        if isinstance(part, ConstantGuidance):
            return (max(1.0, part.scale),) * steps
        if not isinstance(part, GuidanceSchedule):
            raise InputError(f"the plan's guidance is {part.type!r}, which the {self.name} axis does not make")
        if isinstance(part.scale, tuple) and len(part.scale) != steps:
            raise InputError(f"the plan lists {len(part.scale)} guidance scales and the {self.name} axis {steps}")
        return tuple(part.scale_at(index, steps) for index in range(steps))


def _on_line(first: float, last: float, start: int, stop: int, index: int) -> float:
    return first + (last - first) * ((index - start) / max(1, stop - start - 1))


AXES.register("guidance")(GuidanceAxis.of)
AXES.register("guidance-scale")(lambda pipe, base: GuidanceAxis.of(pipe, base, changes=False, window=False))
