"""What the methods that match distributions share: a fake network that follows the student, and score gaps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ...samplers.process import Process
from ..conditions import Condition
from ..lora import LoraSetting
from ..method import Loss, Method, Moment, Needs
from ..role_kinds import Adapter, Base, FullCopy, Kind
from ..rollout import Rollout, check_start, start
from ..schedule import Schedule, Stage
from ..sources import Batch
from ..team import Team, noise_like
from ..terms import DSM, Regression
from ..times import UniformTimes


class Distribution(Method):
    """A student that makes samples from noise, and learns from the scores of teacher and fake at these under noise.

    The fake is the teacher, retrained on the student's samples all the while (`DSM` of the noise, unguided). It is
    updated in every turn, the student in every ``fake_updates``-th, with the fake frozen and in evaluation mode. Both
    learn from the same samples in that turn. A multistep student rolls out to a random one of its times, the same for
    the whole batch in all processes, and learns through the last call only.
    """

    needs: ClassVar[Needs] = "conditions"

    guidance_scale: tuple[float, ...] = Field(
        default=(), max_length=2, description="Of the teacher: one, or the ends of a range; none for the pipeline's."
    )
    fake_rank: int | None = Field(
        default=None, ge=0, description="Rank of the fake's adapter; 0 trains a copy, none holds it as the student."
    )
    fake_updates: int = Field(default=1, ge=1, description="Updates of the fake for each of the student.")
    fake_rate: float = Field(default=1.0, gt=0, description="Learning rate of the fake as a multiple of the student's.")

    @abstractmethod
    def times(self, process: Process) -> tuple[float, ...]:
        """Where the student is asked, noisiest first."""

    @abstractmethod
    def gap(self, batch: Batch, roles: Team, moment: Moment, made: Tensor) -> Tensor:
        """The student's loss of each sample, (B,), from its samples ``made``, (B, ...) with gradient."""

    def kinds(self, student: Kind, network: nn.Module) -> Mapping[str, Kind]:
        """Student, teacher and fake."""
        fake = student
        if self.fake_rank is not None:
            fake = Adapter(LoraSetting(self.fake_rank, float(self.fake_rank))) if self.fake_rank else FullCopy()
        return {"student": student, "teacher": Base(), "fake": fake}

    @property
    def critics(self) -> tuple[str, ...]:
        """The roles that are updated in every turn."""
        return ("fake",)

    def turns(self) -> Schedule:
        """The critics in every turn, the student in the last of each cycle."""
        cycle = ((self.critics,) * (self.fake_updates - 1)) + ((*self.critics, "student"),)
        return Schedule((Stage(cycle),), rates={"fake": self.fake_rate})

    def losses(self, batch: Batch, roles: Team, moment: Moment) -> Iterator[Loss]:
        """The student's where its turn is, and the critics'."""
        taught = "student" in moment.updates
        made = self.sampled(batch, roles, moment, taught)
        if taught:
            yield self.student_loss(batch, roles, moment, made)
        yield from self.critic_losses(batch, roles, moment, made.detach())

    def sampled(self, batch: Batch, roles: Team, moment: Moment, grad: bool) -> Tensor:
        """Clean samples of the student at a random one of its times, by its own steps to there."""
        times = self.times(roles.process)
        check_start(roles.process, times[0])
        count = 1 + int(torch.randint(len(times), (), generator=moment.generator))
        student = roles.denoiser("student", batch.condition, grad=grad, frozen=not grad)
        x = start(roles.process, batch.condition, moment)
        rollout = Rollout(roles.process, times[:count])
        return rollout(student, x, lambda: noise_like(x, moment), "last" if grad else "none")

    def student_loss(self, batch: Batch, roles: Team, moment: Moment, made: Tensor) -> Loss:
        """What the student minimises."""
        return Loss("gap", "student", self.gap(batch, roles, moment, made))

    def critic_losses(self, batch: Batch, roles: Team, moment: Moment, made: Tensor) -> Iterator[Loss]:
        """What the critics minimise, from detached samples."""
        t = UniformTimes()(roles.process, len(batch), moment.generators)
        fake = roles.denoiser("fake", self.told(batch.condition, moment))
        term = DSM(self.followed(roles.process))
        yield Loss("dsm", "fake", term(fake, made, noise_like(made, moment), t))

    def told(self, condition: Condition, moment: Moment) -> Condition:
        """What the fake is told while it learns."""
        return condition

    def followed(self, process: Process) -> Regression:
        """What the fake predicts."""
        return Regression(process, "epsilon")
