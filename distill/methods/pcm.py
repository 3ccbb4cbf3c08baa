"""Phased consistency models."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from ...samplers import Plan
from ...samplers.errors import InputError
from ...samplers.process import Process
from ..deploy import landing_plan, segment_times
from ..jumps import Jump, Landing
from ..method import METHODS, Moment
from ..spans import GridSpans, SpanLaw, segment_edges
from .matching import Distilling, OnGrid


@METHODS.register("pcm")
class PCM(OnGrid, Distilling):
    """Phased consistency models (arXiv:2405.18407): consistency within each of some segments of the trajectory.

    As in the released code the student is its own target, jumps are plain landings, and where the teacher's step ends
    at the edge of a segment the goal is that very point. The adversarial loss is left out. A student of so many phases
    is sampled in as many steps, from edge to edge without noise in between.
    """

    lora_rank: ClassVar[int] = 64

    type: Literal["pcm"] = "pcm"
    phases: int = Field(default=4, ge=1, description="Segments, and steps of the student.")

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        segment_edges(self.grid_steps, self.phases)
        return self

    def spans(self, process: Process, moment: Moment) -> SpanLaw:
        """Neighbours on the grid, and the clean end of their segment."""
        return GridSpans(self.points(process), segment_edges(self.grid_steps, self.phases))

    def jump(self, process: Process) -> Jump:
        """A landing."""
        return Landing()

    def plan(self, process: Process, steps: int) -> Plan:
        """The student's landings, edge by edge."""
        if steps != self.phases:
            raise InputError(f"a student of {self.phases} phases is sampled in as many steps; got {steps}")
        edges = segment_edges(self.grid_steps, self.phases)
        return landing_plan(process, segment_times(self.points(process), edges))
