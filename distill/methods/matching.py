"""What the methods of the consistency family share: the student's jump matches its own from one step nearer the end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from ...samplers.process import Process
from ..distances import DISTANCES, Distance, Huber
from ..jumps import Denoiser, Jump
from ..method import Loss, Method, Moment
from ..role_kinds import Base, Ema, Kind
from ..schedule import Average, Schedule
from ..solvers import SOLVERS
from ..sources import Batch
from ..spans import Span, SpanLaw, even_points
from ..team import Team, noise_like
from ..terms import Match
from ..terms.match import SpanWeight


class Matching(Method):
    """A student that matches its own jump."""

    distance: Literal["l2", "l1", "huber", "pseudo-huber"] = Field(default="huber", description="Of the two jumps.")
    huber_c: float = Field(default=1e-3, gt=0, description="Where the huber distance turns linear.")
    target_decay: float | None = Field(
        default=None, ge=0, lt=1, description="Of the average that is the target; none for the student itself."
    )

    @abstractmethod
    def spans(self, process: Process, moment: Moment) -> SpanLaw:
        """Where the student starts, where the step nearer ends, and where both jumps land."""

    @abstractmethod
    def jump(self, process: Process) -> Jump:
        """The student's parametrisation, which is that of the deployed scheduler."""

    @abstractmethod
    def nearer(self, batch: Batch, roles: Team, moment: Moment, x_t: Tensor, noise: Tensor, span: Span) -> Tensor:
        """The samples at ``span.r``, without gradient.

        Args:
            batch: with data.
            roles: the networks.
            moment: random numbers.
            x_t: the samples at ``span.t``.
            noise: that is in them.
            span: the three times.
        """

    def weight(self) -> SpanWeight | None:
        """Factor of a sample's loss by its times; None for 1."""
        return None

    def kinds(self, student: Kind, network: nn.Module) -> Mapping[str, Kind]:
        """The student, and the average where there is one."""
        return {"student": student} if self.target_decay is None else {"student": student, "target": Ema("student")}

    def turns(self) -> Schedule:
        """The student in every turn."""
        averages = () if self.target_decay is None else (Average("target", self.target_decay),)
        return Schedule(averages=averages)

    def losses(self, batch: Batch, roles: Team, moment: Moment) -> Iterator[Loss]:
        """The match."""
        student = roles.denoiser("student", batch.condition)
        yield Loss("match", "student", self.match(batch, roles, moment, student))

    def match(self, batch: Batch, roles: Team, moment: Moment, student: Denoiser) -> Tensor:
        """The match of each sample, (B,).

        Args:
            batch: with data.
            roles: the networks.
            moment: random numbers.
            student: asked once.
        """
        assert batch.x0 is not None
        span = self.spans(roles.process, moment)(roles.process, len(batch), moment.generators)
        noise = noise_like(batch.x0, moment)
        x_t = roles.process.add_noise(batch.x0, noise, span.t)
        x_r = self.nearer(batch, roles, moment, x_t, noise, span)
        target = roles.denoiser("student" if self.target_decay is None else "target", batch.condition, grad=False)
        match = Match(roles.process, self.jump(roles.process), self.made_distance(), self.weight())
        with roles.paired_noise():
            return match(student, target, x_t, x_r, span)

    def made_distance(self) -> Distance:
        """The distance that the fields say."""
        return Huber(self.huber_c) if self.distance == "huber" else DISTANCES[self.distance]()


class OnGrid(Method):
    """A method whose times are those of a grid."""

    grid_steps: int = Field(default=50, ge=1, description="Intervals of the grid on which the student is trained.")

    def points(self, process: Process) -> tuple[float, ...]:
        """The grid: clean data, and ``grid_steps`` times."""
        return process.clean_time, *even_points(process, self.grid_steps)[1:]


class Stepped(Method):
    """A method with a teacher that takes steps along its probability-flow ODE."""

    solver: str = Field(default="ddim", description="ddim, heun or dpm2: how the teacher steps.")

    @field_validator("solver")
    @classmethod
    def _known_solver(cls, name: str) -> str:
        SOLVERS[name]
        return name

    def stepped(self, roles: Team, teacher: Denoiser, x_t: Tensor, span: Span) -> Tensor:
        """Where one step of the teacher takes ``x_t``, at ``span.r``."""
        return SOLVERS[self.solver]()(roles.process, teacher, x_t, span.t, span.r)


class Distilling(Matching, Stepped):
    """Matching over the steps of a guided teacher."""

    guidance_scale: tuple[float, ...] = Field(
        default=(), max_length=2, description="Of the teacher: one, or the ends of a range; none for the pipeline's."
    )

    def kinds(self, student: Kind, network: nn.Module) -> Mapping[str, Kind]:
        """Student and teacher, and the average where there is one."""
        return {**super().kinds(student, network), "teacher": Base()}

    def nearer(self, batch: Batch, roles: Team, moment: Moment, x_t: Tensor, noise: Tensor, span: Span) -> Tensor:
        """The samples at ``span.r``: one step of the guided teacher from ``x_t``."""
        scale = roles.scales(self.guidance_scale, len(batch), moment.generators)
        return self.stepped(roles, roles.guided("teacher", batch.condition, scale), x_t, span)


class Tuning(Matching):
    """Matching on data alone, without a teacher: the student's own weights are where it begins."""

    def nearer(self, batch: Batch, roles: Team, moment: Moment, x_t: Tensor, noise: Tensor, span: Span) -> Tensor:
        """The samples at ``span.r``: the same data and the same noise."""
        assert batch.x0 is not None
        with torch.no_grad():
            return roles.process.add_noise(batch.x0, noise, span.r)
