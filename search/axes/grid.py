"""The grid as an axis: the first timestep, the last one, and how the log-SNR between them is shared out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import BaseTrial

from ...samplers import ExplicitGrid, InputError, Plan, Process
from ...samplers.schedules import FlowSchedule, TableSchedule
from ..space import AXES
from .steps import distinct, prepared, steps_of, timesteps_of, within


@dataclass(frozen=True)
class GridAxis:
    """An explicit grid of a fixed number of steps.

    The ends are times, ``grid.first`` and ``grid.last``. The points between break a stick, the interval of log-SNR
    between the ends, from the noisy side: of what is left before point i, which m points share, i among them,
    ``grid.i`` = (1 - f)^m says the fraction f that comes before i. So there is one way to say each grid, in order
    and without permutations, and where the parameters are uniform in [0, 1] the points are ``m`` uniform points of
    the stick, sorted: evenly spaced on average, not crowded at its end.

    Times are rounded to whole multiples of ``resolution`` below the noisiest one. Those that fall together are moved
    apart, by a rule that depends on nothing else.

    Attributes:
        pipe: the pipeline that runs the grids.
        process: its forward process.
        steps: of every grid, at least 1.
        first: range of the noisiest time.
        last: range of the cleanest time, all of it below ``first``.
        resolution: distance of neighbouring times.
        name: of the axis.
    """

    pipe: Any
    process: Process
    steps: int
    first: tuple[float, float]
    last: tuple[float, float]
    resolution: float = 1.0
    name: str = "grid"

    def __post_init__(self) -> None:
        cleanest, noisiest = self.process.time_range
        lowest = cleanest if isinstance(self.process.schedule, TableSchedule) else math.nextafter(cleanest, noisiest)
        if not lowest <= self.last[0] <= self.last[1] < self.first[0] <= self.first[1] <= noisiest:
            raise InputError(
                f"the ranges of a grid's ends are apart and in order within the process's times; got last {self.last} "
                f"and first {self.first} for times {cleanest:g} to {noisiest:g}"
            )
        if self.resolution <= 0 or self._position(self.last[1]) - self._position(self.first[0]) < self.steps - 1:
            raise InputError(
                f"{self.steps} steps of resolution {self.resolution:g} do not fit between {self.first[0]:g} and "
                f"{self.last[1]:g}; give a smaller resolution or other ranges"
            )

    @classmethod
    def of(cls, pipe: Any, base: Plan) -> GridAxis:
        """The axis of a plan's number of steps, with ranges that hold the grids in use.

        The noisiest time is at least 0.4 of the range of times, so that an early start is possible, and the cleanest
        one at most 0.2 of it or where a ``trailing`` grid of so few steps ends, shifted as the process is.

        Raises:
            InputError: when the plan has no grid, its solver runs no explicit one, or time runs towards data.
        """
        steps = steps_of("grid", base)
        process = prepared(pipe, base).process
        cleanest, noisiest = process.time_range
        if noisiest <= cleanest:
            raise InputError("time runs towards data on this scheduler (invert_sigmas=True); it has no explicit grids")
        counted = isinstance(process.schedule, TableSchedule | FlowSchedule)
        span = noisiest - cleanest
        resolution = 1.0 if counted else span / 1000
        low = cleanest if isinstance(process.schedule, TableSchedule) else cleanest + resolution
        high = 0.2 if steps == 1 else min(max(0.2, (_trailing_end(process, steps) - cleanest) / span), 0.9)
        first = cleanest + span * (0.4 if steps == 1 else max(0.4, high + 0.05))
        axis = cls(pipe, process, steps, (first, noisiest), (low, cleanest + span * high), resolution)
        prepared(pipe, base.model_copy(update={"grid": axis._grid([axis._position(first)])}))
        return axis

    def suggest(self, trial: BaseTrial, plan: Plan) -> Plan:
        """The plan with the grid that the trial suggests."""
        first = self._position(trial.suggest_float(f"{self.name}.first", *self.first))
        if self.steps == 1:
            return plan.model_copy(update={"grid": self._grid([first])})
        last = self._position(trial.suggest_float(f"{self.name}.last", *self.last))
        place, end = (self._log_snr(self._time(position)) for position in (first, last))
        between = []
        for index in range(1, self.steps - 1):
            share = trial.suggest_float(f"{self.name}.{index}", 0.0, 1.0)
            place = end - (end - place) * share ** (1 / (self.steps - 1 - index))
            between.append(-self._position(float(self.process.time_of_log_snr(place))))
        inner = [-position for position in distinct(between, 1 - last, -1 - first)]
        return plan.model_copy(update={"grid": self._grid([first, *inner, last])})

    def params(self, plan: Plan) -> dict[str, Any]:
        """The parameters of a plan's grid, whatever says it: a list, a rule or the scheduler's own spacing.

        Raises:
            InputError: when it has another number of steps, or an end more than one resolution outside its range.
        """
        times = timesteps_of(self.name, self.pipe, plan)
        if len(times) != self.steps:
            raise InputError(f"the plan has {len(times)} steps and the {self.name} axis {self.steps}; give it as many")
        found = {f"{self.name}.first": within(self.name, "first timestep", times[0], self.first, self.resolution)}
        if self.steps == 1:
            return found
        found[f"{self.name}.last"] = within(self.name, "last timestep", times[-1], self.last, self.resolution)
        noisy, clean = (self._time(self._position(found[f"{self.name}.{end}"])) for end in ("first", "last"))
        place, end = self._log_snr(noisy), self._log_snr(clean)
        for index, time in enumerate(times[1:-1], start=1):
            here = min(max(self._log_snr(time), place), end)
            share = (end - here) / (end - place) if end > place else 0.0
            found[f"{self.name}.{index}"] = share ** (self.steps - 1 - index)
            place = here
        return found

    def _position(self, time: float) -> int:
        """How many resolutions the nearest allowed time is below the noisiest one."""
        noisiest = self.process.time_range.noisiest
        greatest = math.floor((noisiest - self.last[0]) / self.resolution + 1e-6)
        return min(round((noisiest - time) / self.resolution), greatest)

    def _time(self, position: int) -> float:
        return round(self.process.time_range.noisiest - position * self.resolution, 9)

    def _grid(self, positions: Sequence[int]) -> ExplicitGrid:
        return ExplicitGrid(timesteps=tuple(map(self._time, positions)))

    def _log_snr(self, time: float) -> float:
        """Log-SNR, of the noisiest time that of half a resolution below, for its own may be infinite."""
        return float(self.process.log_snr(min(time, self.process.time_range.noisiest - self.resolution / 2)))


def _trailing_end(process: Process, steps: int) -> float:
    """The cleanest time of a grid that is even from the noisiest time on; of an unknown shift, with one of 3."""
    schedule = process.schedule
    if isinstance(schedule, FlowSchedule) and schedule.shift is None:
        process = process.with_shift(3.0)
    return float(process.from_uniform(1 / steps))


AXES.register("grid")(GridAxis.of)
