"""Latent consistency distillation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...samplers import Plan
from ...samplers.process import Process
from ...samplers.schedules import FlowSchedule
from ..deploy import consistency_plan, spread
from ..jumps import Jump, Landing, LCMBoundary
from ..method import METHODS, Moment
from ..spans import GridSpans, SpanLaw
from .matching import Matching


@METHODS.register("lcm")
class LCM(Matching):
    """Latent consistency models (arXiv:2310.04378 algorithm 1): to clean data from any time, over skipped steps.

    As in diffusers' script, with two differences: the last interval ends at clean data instead of timestep 0, and the
    guidance scale is g of uncond + g (cond - uncond), which is the paper's w + 1.
    """

    type: Literal["lcm"] = "lcm"
    target_decay: float | None = Field(
        default=0.95, ge=0, lt=1, description="Of the average that is the target; none for the student itself."
    )
    timestep_scaling: float = Field(default=10.0, gt=0, description="Of the boundary, and of the deployed scheduler.")

    def spans(self, process: Process, moment: Moment) -> SpanLaw:
        """Neighbours on the grid, and clean data."""
        return GridSpans(self.points(process))

    def jump(self, process: Process) -> Jump:
        """The paper's boundary condition; flow matching's scheduler has none, and its jump lands on clean data."""
        return Landing() if _is_flow(process) else LCMBoundary(timestep_scaling=self.timestep_scaling)

    def plan(self, process: Process, steps: int) -> Plan:
        """Multistep consistency sampling at times of the grid."""
        config = {} if _is_flow(process) else {"timestep_scaling": self.timestep_scaling}
        return consistency_plan(process, spread(self.points(process), steps), **config)


def _is_flow(process: Process) -> bool:
    return isinstance(process.schedule, FlowSchedule)
