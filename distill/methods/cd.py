"""Consistency distillation."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from ...samplers.process import Process
from ..method import METHODS, Moment
from ..spans import GridSpans, SpanLaw, karras_points
from .matching import Distilling
from .multistep import MultistepOnGrid


@METHODS.register("cd")
class CD(MultistepOnGrid, Distilling):
    """Consistency distillation (arXiv:2303.01469 algorithm 2) over Heun steps between neighbours of Karras' grid.

    The grid is even in (sigma/alpha)^(1/rho) on every process. The paper's student lands at the smallest noise level,
    this one on clean data, where the deployed schedulers land: one more interval of the grid ends there. A process
    whose noisiest time has no data begins with one more interval too.
    """

    type: Literal["cd"] = "cd"
    grid_steps: int = Field(default=40, ge=3, description="Intervals of the grid on which the student is trained.")
    rho: float = Field(default=7.0, gt=0, description="Exponent of the grid.")
    sigma_min: float = Field(
        default=0.002, gt=0, description="Smallest sigma/alpha above clean data, where the process names none."
    )
    sigma_max: float = Field(default=80.0, gt=0, description="Largest one before pure noise, where it names none.")
    solver: str = Field(default="heun", description="ddim, heun or dpm2: how the teacher steps.")
    distance: Literal["l2", "l1", "huber", "pseudo-huber"] = Field(default="l2", description="Of the two jumps.")
    target_decay: float | None = Field(
        default=0.95, ge=0, lt=1, description="Of the average that is the target; none for the student itself."
    )

    def points(self, process: Process) -> tuple[float, ...]:
        """The grid: clean data, Karras' levels, and pure noise where the process has it."""
        cleanest, noisiest = (float(process.log_snr(end)) for end in process.time_range)
        low, high = (self.sigma_min if math.isinf(cleanest) else None), None
        top: tuple[float, ...] = ()
        if math.isinf(noisiest):
            high, top = self.sigma_max, (process.time_range.noisiest,)
        levels = karras_points(process, self.grid_steps - len(top), self.rho, low, high)
        return process.clean_time, *levels, *top

    def spans(self, process: Process, moment: Moment) -> SpanLaw:
        """Neighbours on the grid, and clean data."""
        return GridSpans(self.points(process))
