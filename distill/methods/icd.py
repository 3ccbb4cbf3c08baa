"""Invertible consistency distillation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...samplers import Plan
from ...samplers.errors import InputError
from ...samplers.process import Process
from ...samplers.rules import cleanest
from ..conditions import Condition
from ..deploy import landing_plan, segment_times
from ..distances import Huber
from ..guidance_embedding import told
from ..method import METHODS, Loss, Moment
from ..role_kinds import Base, Kind
from ..schedule import Schedule, Stage
from ..sources import Batch
from ..spans import GridSpans, segment_edges
from ..team import Team, noise_like
from ..terms import Match
from ..times import Choice, indices
from .matching import OnGrid, Stepped
from .telling import Embedding

REVERSE, FORWARD = "student", "forward_student"


class Segments(NamedTuple):
    """Ends of some samples' segments, each (B,) float64.

    Attributes:
        clean: where the reverse student lands.
        start: where the forward student is asked; above ``clean`` in the first segment.
        noisy: where the reverse student is asked, and the forward one lands.
    """

    clean: Tensor
    start: Tensor
    noisy: Tensor


@METHODS.register("icd")
class ICD(Embedding, OnGrid, Stepped):
    """Invertible consistency distillation (arXiv:2406.14539): a student towards data, and one towards noise.

    Both match their own jumps within segments, where the edge itself is the goal of the last step. The reverse one
    learns the teacher at one of the listed guidance scales, the forward one the teacher without guidance, and each
    learns to undo the other's jump over a segment, also without guidance. In the released code the weight of one of
    these two losses switches both; here each has its own. The code steps its optimisers after each of the four
    losses, here their gradients are summed. Clean data are shown to the forward student as the cleanest noisy time.

    The paper's students are told the guidance scale (``embed_guidance``), which needs a U-Net and all weights. One
    that is not told cannot be guided and yet undo an unguided jump: it has the scale 1, or both preservation losses
    are off. Guidance that changes over the steps is for students that are told.
    """

    lora_rank: ClassVar[int] = 64
    students: ClassVar[tuple[str, ...]] = (REVERSE, FORWARD)

    type: Literal["icd"] = "icd"
    segments: int = Field(default=4, ge=1, description="Steps of each student.")
    guidance_scale: tuple[float, ...] = Field(
        default=(1.0,), min_length=1, description="Of the reverse student's teacher: each is drawn equally often."
    )
    forward_preserve: float = Field(default=1.5, ge=0, description="Weight of the forward student's undoing.")
    reverse_preserve: float = Field(default=1.5, ge=0, description="Weight of the reverse student's undoing.")
    huber_c: float = Field(default=1e-3, gt=0, description="Where the huber distance turns linear.")

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        segment_edges(self.grid_steps, self.segments)
        undoing = self.forward_preserve > 0 or self.reverse_preserve > 0
        if not self.embed_guidance and undoing and set(self.guidance_scale) != {1.0}:
            raise InputError(
                f"students that are not told the guidance scale cannot undo jumps guided by {list(self.guidance_scale)}"
                "; set guidance_scale to 1, both preserve weights to 0, or embed_guidance"
            )
        return self

    def kinds(self, student: Kind, network: nn.Module) -> Mapping[str, Kind]:
        """Both students and the teacher."""
        self.refuse_adapter(student)
        return {REVERSE: student, FORWARD: student, "teacher": Base()}

    def turns(self) -> Schedule:
        """Both students in every turn."""
        return Schedule((Stage(((REVERSE, FORWARD),)),))

    def plan(self, process: Process, steps: int) -> Plan:
        """The reverse student's landings, edge by edge."""
        if steps != self.segments:
            raise InputError(f"students of {self.segments} segments are sampled in as many steps; got {steps}")
        return landing_plan(process, segment_times(self.points(process), self.edges))

    @property
    def edges(self) -> tuple[int, ...]:
        """Indices of the grid's points where segments begin."""
        return segment_edges(self.grid_steps, self.segments)

    def forward_points(self, process: Process) -> tuple[float, ...]:
        """The forward student's grid: that of the other, but that it begins where a network can be asked."""
        return cleanest(process), *self.points(process)[1:]

    def losses(self, batch: Batch, roles: Team, moment: Moment) -> Iterator[Loss]:
        """A match of each student, and of each the undoing of the other."""
        assert batch.x0 is not None
        noise, device = noise_like(batch.x0, moment), batch.x0.device
        scale = Choice(self.guidance_scale)(len(batch), moment.generators)
        unguided = torch.ones_like(scale)
        plain = self._told(batch.condition, unguided, device)
        yield self._match(REVERSE, batch, roles, moment, noise, scale, self._told(batch.condition, scale, device))
        yield self._match(FORWARD, batch, roles, moment, noise, unguided, plain)
        segments = self._segments(roles.process, moment, len(batch))
        if self.forward_preserve > 0:
            yield self._undone(FORWARD, batch.x0, noise, roles, plain, segments)
        if self.reverse_preserve > 0:
            yield self._undone(REVERSE, batch.x0, noise, roles, plain, segments)

    def _told(self, condition: Condition, scale: Tensor, device: torch.device) -> Condition:
        return told(condition, scale, device) if self.embed_guidance else condition

    def _match(
        self, role: str, batch: Batch, roles: Team, moment: Moment, noise: Tensor, scale: Tensor, condition: Condition
    ) -> Loss:
        """The student's jump to the end of a segment is that from one step of the teacher nearer to it."""
        assert batch.x0 is not None
        process, forward = roles.process, role == FORWARD
        points = self.forward_points(process) if forward else self.points(process)
        span = GridSpans(points, self.edges, forward=forward)(process, len(batch), moment.generators)
        x_t = process.add_noise(batch.x0, noise, span.t)
        x_r = self.stepped(roles, roles.guided("teacher", batch.condition, scale), x_t, span)
        student, target = (roles.denoiser(role, condition, grad=grad) for grad in (True, False))
        with roles.paired_noise():
            return Loss("match", role, self._term(process)(student, target, x_t, x_r, span))

    def _undone(
        self, role: str, x0: Tensor, noise: Tensor, roles: Team, condition: Condition, segments: Segments
    ) -> Loss:
        """The student's jump over a segment takes back that of the other, from data with noise."""
        process, (clean, start, noisy) = roles.process, segments
        if role == FORWARD:
            undone, weight, (home, asked, away, back) = REVERSE, self.forward_preserve, (noisy, noisy, clean, start)
        else:
            undone, weight, (home, asked, away, back) = FORWARD, self.reverse_preserve, (clean, start, noisy, noisy)
        x, term = process.add_noise(x0, noise, home), self._term(process)
        with torch.no_grad():
            prediction = roles.denoiser(undone, condition, frozen=True)(x, asked)
            landed = term.jump(process, x, asked, away, prediction)
        return Loss("preserve", role, weight * term.preserve(roles.denoiser(role, condition), landed, back, home, x))

    def _segments(self, process: Process, moment: Moment, count: int) -> Segments:
        """A segment for each sample, all equally often."""
        chosen = indices(None, self.segments, count, moment.generators)
        ends = torch.tensor((*self.edges, self.grid_steps))
        lower, upper = ends[chosen], ends[chosen + 1]
        landing, asking = (
            torch.tensor(points, dtype=torch.float64) for points in (self.points(process), self.forward_points(process))
        )
        return Segments(landing[lower], asking[lower], landing[upper])

    def _term(self, process: Process) -> Match:
        return Match(process, distance=Huber(self.huber_c))
