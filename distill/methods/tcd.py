"""Trajectory consistency distillation."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ...samplers import Plan
from ...samplers.process import Process
from ...samplers.schedules import TableSchedule
from ..deploy import spread, trajectory_plan
from ..jumps import Jump, Landing
from ..method import METHODS, Moment
from ..spans import SpanLaw, TrajectorySpans, even_points
from .matching import Distilling, OnGrid


@METHODS.register("tcd")
class TCD(OnGrid, Distilling):
    """Trajectory consistency distillation (arXiv:2402.19159): from any time to any cleaner one.

    The network is not told where it lands; the landing alpha_s x0 + sigma_s eps is the paper's first-order
    parametrisation. On a table the grid ends at timestep 0, where ``TCDScheduler`` stops. The training code was not
    released; the defaults are those of latent consistency models.
    """

    lora_rank: ClassVar[int] = 64

    type: Literal["tcd"] = "tcd"
    eta: float = Field(
        default=0.3, ge=0, le=1, description="Noise of the deployed sampler, the paper's gamma; 0 for none."
    )

    def points(self, process: Process) -> tuple[float, ...]:
        """The grid: where the deployed scheduler stops, and ``grid_steps`` times."""
        if isinstance(process.schedule, TableSchedule):
            return even_points(process, self.grid_steps)
        return super().points(process)

    def spans(self, process: Process, moment: Moment) -> SpanLaw:
        """Neighbours on the grid, and any of its points from there."""
        return TrajectorySpans(self.points(process))

    def jump(self, process: Process) -> Jump:
        """A landing."""
        return Landing()

    def plan(self, process: Process, steps: int) -> Plan:
        """Strategic stochastic sampling (the paper's algorithm 4) at times of the grid."""
        return trajectory_plan(process, spread(self.points(process), steps), self.eta)
