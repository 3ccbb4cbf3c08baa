"""What students share that land on clean data from any time."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from ...samplers import Plan
from ...samplers.process import Process
from ...samplers.schedules import TableSchedule
from ..deploy import consistency_plan, spread
from ..jumps import Jump, Landing, LCMBoundary
from .matching import Matching, OnGrid


class Multistep(Matching):
    """A student that lands on clean data, and is sampled by noising that again (arXiv:2303.01469 algorithm 1)."""

    timestep_scaling: float = Field(
        default=10.0, gt=0, description="Of the boundary where times are a table's, and of the deployed scheduler."
    )

    def jump(self, process: Process) -> Jump:
        """The boundary condition of LCM, which its scheduler has; those of other processes have none."""
        return LCMBoundary(timestep_scaling=self.timestep_scaling) if _is_table(process) else Landing()

    def sampled_at(self, process: Process, times: Sequence[float]) -> Plan:
        """Multistep consistency sampling at ``times``, noisiest first."""
        config = {"timestep_scaling": self.timestep_scaling} if _is_table(process) else {}
        return consistency_plan(process, times, **config)


class MultistepOnGrid(Multistep, OnGrid):
    """Such a student that is trained at the times of a grid."""

    def plan(self, process: Process, steps: int) -> Plan:
        """Multistep consistency sampling at times of the grid."""
        return self.sampled_at(process, spread(self.points(process), steps))


def _is_table(process: Process) -> bool:
    return isinstance(process.schedule, TableSchedule)
