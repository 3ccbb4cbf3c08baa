"""Trajectory segmented consistency distillation."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from ...samplers import Plan
from ...samplers.errors import InputError
from ...samplers.process import Process
from ..deploy import landing_plan, segment_times
from ..jumps import Jump, Landing
from ..method import METHODS, Moment
from ..schedule import Schedule, Stage
from ..spans import SpanLaw, TrajectorySpans, segment_edges
from .matching import Distilling, OnGrid


@METHODS.register("tscd")
class TSCD(OnGrid, Distilling):
    """Trajectory segmented consistency distillation of Hyper-SD (arXiv:2404.13686): fewer and longer segments.

    Each stage begins with the weights of the last one and a fresh optimiser. Within a segment the student lands at any
    point of the grid, as in consistency trajectory models (arXiv:2310.02279), so that one of few segments can be
    sampled in more steps. Of the method's losses this is the mean square alone: not the adversarial one, nor the human
    feedback and the score distillation that follow. The training code was not released.
    """

    lora_rank: ClassVar[int] = 64

    type: Literal["tscd"] = "tscd"
    segments: tuple[int, ...] = Field(default=(8, 4, 2, 1), min_length=1, description="Of each stage, falling.")
    stage_steps: int = Field(default=2000, ge=1, description="Updates of each stage but the last, which goes on.")
    distance: Literal["l2", "l1", "huber", "pseudo-huber"] = Field(default="l2", description="Of the two jumps.")

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if any(a <= b for a, b in pairwise(self.segments)):
            raise InputError(f"segments must fall from stage to stage; got {self.segments}")
        for count in self.segments:
            segment_edges(self.grid_steps, count)
        return self

    @property
    def least_updates(self) -> int:
        """Those of all stages but the last, and one."""
        return (len(self.segments) - 1) * self.stage_steps + 1

    def turns(self) -> Schedule:
        """The student in every turn, in stages."""
        starts = [index * self.stage_steps for index in range(len(self.segments))]
        first, *later = (Stage(start=start, fresh=("student",) if start else ()) for start in starts)
        return Schedule((first, *later), super().turns().averages)

    def spans(self, process: Process, moment: Moment) -> SpanLaw:
        """Neighbours on the grid, and any of its points from there to the clean end of their segment."""
        edges = segment_edges(self.grid_steps, self.segments[moment.stage])
        return TrajectorySpans(self.points(process), edges)

    def jump(self, process: Process) -> Jump:
        """A landing."""
        return Landing()

    def plan(self, process: Process, steps: int) -> Plan:
        """The student's landings, none of them over the edge of a segment of the last stage."""
        segments = self.segments[-1]
        if steps % segments or not segments <= steps <= self.grid_steps:
            raise InputError(
                f"a student of {segments} segments is sampled in a multiple of that, up to its {self.grid_steps} grid "
                f"steps; got {steps}"
            )
        return landing_plan(process, segment_times(self.points(process), segment_edges(self.grid_steps, steps)))
