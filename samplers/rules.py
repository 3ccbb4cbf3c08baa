"""Rules that make a list of timesteps for any process, and those of them that space time itself.

A rule is frozen data and knows only the `Process`; a scheduler's own habits (an offset, an end that it leaves out)
are filled in by `Rule.suited`. Rules over noise levels are in `level_rules`.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from .errors import InputError
from .explicit import EXPLICIT
from .process import Process
from .recognise import own_option
from .registry import Registry
from .schedules import FlowSchedule, TableSchedule
from .solver import make_scheduler

Floats = NDArray[np.float64]

ENDS_BEFORE_LAST = frozenset(
    {
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "SASolverScheduler",
        "UniPCMultistepScheduler",
    }
)
"Schedulers whose linspace and leading grids have one point more than steps, and drop the cleanest."


class Rule(BaseModel):
    """A rule for a list of timesteps. Its fields are its options; ``None`` is the rule's own choice."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rounds: ClassVar[bool] = False
    "Whether times of a table are whole numbers unless `round` says otherwise."

    round: bool | None = Field(default=None, description="Whole timesteps only.")
    shift: float | None = Field(default=None, gt=0, description="Flow matching's shift in place of the scheduler's.")
    first: float | None = Field(default=None, description="The noisiest time; null for the process's noisiest.")

    def times(self, process: Process, steps: int) -> tuple[float, ...]:
        """The grid: ``steps`` strictly decreasing times of ``process``, noisiest first, none of them clean data.

        Args:
            process: of the scheduler that will run the grid.
            steps: number of times, at least 1.

        Raises:
            InputError: when the rule has no such grid on this process: times repeat or leave the process's range.
        """
        if steps < 1:
            raise InputError(f"steps must be at least 1; got {steps}")
        if process.time_range.noisiest < process.time_range.cleanest:
            raise InputError("time runs towards data on this scheduler (invert_sigmas=True); no rule makes its grid")
        if self.shift is not None:
            process = process.with_shift(self.shift)
        self._check_ends(process)
        times = self._made(process, steps)
        if _distinct(times) < steps:
            self._refuse_repeats(process, steps)
        self._check(process, times)
        return tuple(times.tolist())

    def prepared(self, scheduler: Any) -> Any:
        """The scheduler this rule runs on: ``scheduler`` itself, or one made from it with what the rule needs.

        Raises:
            InputError: when it cannot have that.
        """
        return scheduler

    def suited(self, scheduler: Any, process: Process) -> Self:
        """This rule with the options that were left open filled in as ``scheduler``, of ``process``, has them.

        Here: the first time, where ``lambda_min_clipped`` bounds the noise (DPM-Solver on cosine betas).
        """
        clip = own_option(scheduler, "lambda_min_clipped", -math.inf)
        if self.first is not None or math.isinf(clip) or not isinstance(process.schedule, TableSchedule):
            return self
        dropped = int((scheduler.lambda_t < clip).sum())
        return self.model_copy(update={"first": process.time_range.noisiest - dropped})

    def noisiest(self, process: Process) -> float:
        """The noisiest time of the grid's range."""
        return process.time_range.noisiest if self.first is None else self.first

    @abstractmethod
    def _times(self, process: Process, steps: int) -> Floats:
        """The times before they are rounded."""

    def _made(self, process: Process, steps: int) -> Floats:
        times = self._times(process, steps)
        return self._rounded(times, process) if self._rounding(process) else times

    def _rounding(self, process: Process) -> bool:
        if self.round and not isinstance(process.schedule, TableSchedule | FlowSchedule):
            raise InputError("this process has no whole timesteps to round to; leave the option 'round' out")
        return self.rounds and isinstance(process.schedule, TableSchedule) if self.round is None else self.round

    def _rounded(self, times: Floats, process: Process) -> Floats:
        return np.round(times)

    def _refuse_repeats(self, process: Process, steps: int) -> None:
        """Raises for a grid that has a time twice, saying how many steps have none."""
        distinct = _distinct(self._made(process, steps))
        fitting = (n for n in range(distinct, 0, -1) if _distinct(self._made(process, n)) == n)
        mend = ", or set the option 'round' to false" if self._rounding(process) else ""
        raise InputError(
            f"{steps} steps repeat a timestep; at most {next(fitting)} fit this rule here: ask for no more{mend}"
        )

    def _check_ends(self, process: Process) -> None:
        low, high = process.time_range
        for name in ("first", "last"):
            time = getattr(self, name, None)
            if time is not None and (not low <= time <= high or time == process.clean_time):
                above = "above" if low == process.clean_time else "at least"
                raise InputError(f"{name!r} must be {above} {low:g} and at most {high:g} on this process; got {time:g}")

    def _check(self, process: Process, times: Floats) -> None:
        for before, after in pairwise(times.tolist()):
            if after > before:
                raise InputError(f"times must decrease; the rule gives {before:g} before {after:g}: mend its options")
        noisiest, clean = process.time_range.noisiest, process.clean_time
        for time in times[[0, -1]].tolist():
            if not clean < time <= noisiest:
                raise InputError(
                    f"the rule gives timestep {time:g}, and this process has those above {clean:g} and up to "
                    f"{noisiest:g}; mend its options"
                )
        if process.prediction_type == "epsilon" and float(process.alpha(float(times[0]))) == 0:
            raise InputError(
                f"epsilon prediction is undefined at timestep {times[0]:g}, where the SNR is zero; use a v_prediction "
                "or sample network, or a grid that starts later"
            )


def _distinct(times: Floats) -> int:
    """Number of times that differ in float32, as which schedulers tell them."""
    return int(np.unique(times.astype(np.float32)).size)


RULES: Registry[type[Rule]] = Registry("grid rule")


@dataclass(frozen=True)
class Axis:
    """The coordinate in which a scheduler's own times are even.

    The time itself where there is a table of timesteps; elsewhere the fraction ``u`` of `Process.from_uniform`,
    which has flow matching's shift and EDM's exponent in it.
    """

    process: Process

    def __post_init__(self) -> None:
        schedule = self.process.schedule
        if isinstance(schedule, FlowSchedule) and schedule.shift is None:
            raise InputError(
                "this scheduler shifts by resolution; give the rule the option 'shift', exp(mu) for the mu that the "
                "pipeline computes"
            )

    @property
    def even_in_time(self) -> bool:
        """Whether the coordinate is the time."""
        return isinstance(self.process.schedule, TableSchedule)

    @property
    def clean(self) -> float:
        """Where a step to clean data ends."""
        return self.process.clean_time if self.even_in_time else 0.0

    def times(self, points: Floats) -> Floats:
        """Times of points."""
        if self.even_in_time:
            return points
        return np.asarray(self.process.from_uniform(torch.from_numpy(points.copy())).numpy())

    def point(self, time: float) -> float:
        """The point of a time of the process. `times` increases: 60 halvings find it."""
        if self.even_in_time:
            return time
        low, high = 0.0, 1.0
        if time >= float(self.process.from_uniform(high)):
            return high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if float(self.process.from_uniform(middle)) < time else (low, middle)
        return high


def cleanest(process: Process) -> float:
    """The cleanest time of a grid that names none.

    The last of the process where noise is left there. Flow matching has none at its last time: a thousandth of the
    way from data, then shifted, as diffusers' flow schedulers have it.
    """
    last = process.time_range.cleanest
    if float(process.sigma(last)) > 0:
        return last
    if isinstance(process.schedule, FlowSchedule) and process.schedule.shift is None:
        return process.time_range.noisiest / 1000
    return float(process.from_uniform(1 / 1000))


class Ranged(Rule):
    """A rule between two times."""

    last: float | None = Field(default=None, description="The cleanest time; null for the process's cleanest.")
    endpoint: bool | None = Field(
        default=None, description="Whether 'last' is in the grid, or only where an extra step would start."
    )

    ends: ClassVar[bool] = True
    "The endpoint unless an option or the scheduler says otherwise."

    def suited(self, scheduler: Any, process: Process) -> Self:
        """Flow matching: the scheduler's own cleanest sigma, shifted (once more) as its ``set_timesteps`` does."""
        schedule, own = process.schedule, vars(scheduler).get("sigma_min")
        shift = self.shift or getattr(schedule, "shift", None)
        rule = super().suited(scheduler, process)
        if self.last is not None or own is None or shift is None or not isinstance(schedule, FlowSchedule):
            return rule
        return rule.model_copy(update={"last": float(process.with_shift(shift).from_uniform(float(own)))})

    def between(self, process: Process) -> tuple[float, float]:
        """The noisiest and the cleanest time.

        Raises:
            InputError: when they do not decrease.
        """
        first = self.noisiest(process)
        last = cleanest(process) if self.last is None else self.last
        if not first > last:
            raise InputError(f"'first' must be noisier than 'last'; got first {first:g} and last {last:g}")
        return first, last

    def count(self, steps: int) -> int:
        """Number of points before one that is no endpoint is dropped."""
        return steps if (self.ends if self.endpoint is None else self.endpoint) else steps + 1


class Spacing(Rule):
    """A rule that is one of diffusers' ``timestep_spacing`` (arXiv:2305.08891, table 2)."""

    rounds: ClassVar[bool] = True
    spacing: ClassVar[str]

    def prepared(self, scheduler: Any) -> Any:
        """Where the scheduler has a ``timestep_spacing``, sets it: Euler's first state is scaled by it."""
        if not _has_option(type(scheduler), "timestep_spacing"):
            return scheduler
        return make_scheduler(type(scheduler), scheduler, {"timestep_spacing": self.spacing})


class Curve(Ranged):
    """Times at powers of even fractions, in whole numbers where the scheduler has a table."""

    rounds: ClassVar[bool] = True

    def suited(self, scheduler: Any, process: Process) -> Self:
        """The multistep solvers' grids end a step before ``last``."""
        rule = super().suited(scheduler, process)
        if rule.endpoint is None and type(scheduler).__name__ in ENDS_BEFORE_LAST:
            return rule.model_copy(update={"endpoint": False})
        return rule

    @abstractmethod
    def power(self) -> float:
        """The exponent, above 0."""

    def _times(self, process: Process, steps: int) -> Floats:
        axis = Axis(process)
        first, last = (axis.point(time) for time in self.between(process))
        count = self.count(steps)
        if count == 1:
            return axis.times(np.array([first]))
        points = np.linspace(last, first, count)[::-1][:steps]
        if self.power() != 1:
            points = last + (first - last) * ((points - last) / (first - last)) ** self.power()
        return axis.times(points)

    def _rounding(self, process: Process) -> bool:
        """As the others, but that Euler's family has fractions."""
        return super()._rounding(process) and not (self.round is None and process.state_over_alpha)


@RULES.register("linspace")
class Linspace(Curve, Spacing):
    """Even times, both ends in it. A single step starts at the noisiest time (diffusers: at the cleanest)."""

    spacing: ClassVar[str] = "linspace"

    def power(self) -> float:
        """The exponent, above 0."""
        return 1.0


@RULES.register("quadratic")
class Quadratic(Curve):
    """Squares of even fractions (arXiv:2010.02502, appendix D.2, whose code has ``first`` at 0.8 of the range)."""

    def power(self) -> float:
        """The exponent, above 0."""
        return 2.0


@RULES.register("power")
class Power(Curve):
    """Powers of even fractions: above 1 denser at the clean end, below 1 at the noisy one."""

    exponent: float = Field(default=1.0, gt=0, description="1 is linspace, 2 quadratic.")

    def power(self) -> float:
        """The exponent, above 0."""
        return self.exponent


@RULES.register("leading")
class Leading(Spacing):
    """Even times from the cleanest up, each the cleaner end of its share: ``first`` itself is not in it."""

    spacing: ClassVar[str] = "leading"
    offset: int | None = Field(default=None, ge=0, description="Added to every time; null for steps_offset.")
    endpoint: bool | None = Field(default=None, description="Whether the cleanest time is in the grid.")

    def suited(self, scheduler: Any, process: Process) -> Self:
        """The scheduler's ``steps_offset``; the multistep solvers leave the cleanest time out."""
        offset, endpoint = self.offset, self.endpoint
        if offset is None and isinstance(process.schedule, TableSchedule):
            offset = own_option(scheduler, "steps_offset", 0)
        if endpoint is None:
            endpoint = type(scheduler).__name__ not in ENDS_BEFORE_LAST
        return super().suited(scheduler, process).model_copy(update={"offset": offset, "endpoint": endpoint})

    def _times(self, process: Process, steps: int) -> Floats:
        axis = Axis(process)
        count = steps + 1 if self.endpoint is False else steps
        order = np.arange(count)[::-1][:steps]
        if axis.even_in_time:
            return np.asarray(order * (int(self.noisiest(process) + 1) // count) + float(self.offset or 0))
        if self.offset is not None:
            raise InputError(f"only a table of timesteps has an offset; got {self.offset}: leave 'offset' out")
        start, end = axis.point(cleanest(process)), axis.point(self.noisiest(process))
        return axis.times(np.asarray(start + order * ((end - start) / count), dtype=np.float64))


@RULES.register("trailing")
class Trailing(Spacing):
    """Even times from the noisiest down, each the noisier end of its share, so that the last step ends at data."""

    spacing: ClassVar[str] = "trailing"

    def _times(self, process: Process, steps: int) -> Floats:
        axis = Axis(process)
        length = axis.point(self.noisiest(process)) - axis.clean
        left = np.asarray(length - np.arange(steps) * (length / steps), dtype=np.float64)
        return axis.times(axis.clean + left)

    def _rounded(self, times: Floats, process: Process) -> Floats:
        """Rounds what is left to clean data, whose last half counts as a whole."""
        return np.round(times - process.clean_time) + process.clean_time


@RULES.register("trailing-zero-snr")
class TrailingZeroSNR(Trailing):
    """Trailing on betas that are rescaled to zero terminal SNR (arXiv:2305.08891, sections 3.1 and 3.3)."""

    option: ClassVar[str] = "rescale_betas_zero_snr"

    def prepared(self, scheduler: Any) -> Any:
        """Sets ``rescale_betas_zero_snr`` in the scheduler.

        Raises:
            InputError: when the scheduler has no such option, or the network predicts epsilon.
        """
        cls = type(scheduler)
        if not _has_option(cls, self.option):
            raise InputError(f"{cls.__name__} has no {self.option}; use one of {', '.join(zero_snr_schedulers())}")
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("v_prediction", "sample"):
            why = "epsilon is undefined at SNR 0" if kind == "epsilon" else "this one has zero SNR already"
            raise InputError(
                f"{self.option} goes with v_prediction or sample; got prediction_type={kind!r}: {why}, use the rule "
                "'trailing'"
            )
        return make_scheduler(cls, super().prepared(scheduler), {self.option: True})


def zero_snr_schedulers() -> list[str]:
    """Names of the schedulers that run an explicit grid and can rescale their betas to zero terminal SNR."""
    return [name for name in EXPLICIT.names() if _has_option(getattr(diffusers, name), TrailingZeroSNR.option)]


def _has_option(scheduler_class: Any, option: str) -> bool:
    return option in inspect.signature(scheduler_class.__init__).parameters
