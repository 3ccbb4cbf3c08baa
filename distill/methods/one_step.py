"""Matching of distributions by a student of one step."""

from __future__ import annotations

from pydantic import Field

from ...samplers import Plan
from ...samplers.errors import InputError
from ...samplers.process import Process
from ..deploy import landing_plan
from ..rollout import check_start
from .distribution import Distribution


class OneStep(Distribution):
    """A student that goes from noise to clean data in one call."""

    time: float | None = Field(default=None, description="At which the student is shown noise; none for the noisiest.")

    def times(self, process: Process) -> tuple[float, ...]:
        """The one."""
        return (process.time_range.noisiest if self.time is None else self.time,)

    def plan(self, process: Process, steps: int) -> Plan:
        """One step to clean data."""
        if steps != 1:
            raise InputError(f"{self.type} trains a student of 1 step; it cannot be sampled in {steps}")
        times = self.times(process)
        check_start(process, times[0])
        return landing_plan(process, times)
