"""Distillation to a continuous-time consistency model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field
from torch import nn

from ...samplers import Plan
from ...samplers.process import Process
from ..deploy import consistency_plan
from ..method import METHODS, Loss, Method, Moment
from ..role_kinds import Base, Kind
from ..schedule import Schedule
from ..sources import Batch
from ..spans import even_points
from ..team import Team, noise_like
from ..terms import Tangent
from ..times import LogNormalTimes, UniformTimes


@METHODS.register("scm")
class SCM(Method):
    """sCD, the distillation of simplified continuous-time consistency models (arXiv:2410.11081 algorithm 1).

    Any process is turned to the paper's quarter circle, with data of standard deviation 1. The derivative along the
    teacher's path is a central difference, so that any attention and checkpointing will do. Below float32 its rounding
    shows: widen ``difference`` to 1e-2 for bfloat16, and leave TF32 off.

    The paper learns the logarithm of the loss's size at each time beside the student, which evens the times out. Since
    the tangent is normalised, that size is much the same at all times, and there is no second network here.
    """

    type: Literal["scm"] = "scm"
    guidance_scale: tuple[float, ...] = Field(
        default=(), max_length=2, description="Of the teacher: one, or the ends of a range; none for the pipeline's."
    )
    times: Literal["log-normal", "uniform"] = Field(
        default="log-normal", description="Law of the times; uniform is even in the scheduler's own spacing."
    )
    times_mean: float = Field(default=-0.3, description="Of log(sigma/alpha), log-normal times.")
    times_std: float = Field(default=1.4, gt=0, description="Of log(sigma/alpha), log-normal times.")
    difference: float = Field(default=2e-3, gt=0, lt=0.1, description="Half the angle of the central difference.")
    tangent_c: float = Field(default=0.1, gt=0, description="Added to the tangent's norm, which it is divided by.")
    warmup_steps: int = Field(
        default=10000, ge=0, description="Updates until the tangent's unstable part has its full share."
    )

    def kinds(self, student: Kind, network: nn.Module) -> Mapping[str, Kind]:
        """Student and teacher."""
        return {"student": student, "teacher": Base()}

    def turns(self) -> Schedule:
        """The student in every turn."""
        return Schedule()

    def plan(self, process: Process, steps: int) -> Plan:
        """Multistep consistency sampling, in any number of steps."""
        return consistency_plan(process, even_points(process, steps)[:0:-1])

    def losses(self, batch: Batch, roles: Team, moment: Moment) -> Iterator[Loss]:
        """The tangent's loss, every time alike."""
        assert batch.x0 is not None
        process, count = roles.process, len(batch)
        law = LogNormalTimes(self.times_mean, self.times_std) if self.times == "log-normal" else UniformTimes()
        t = law(process, count, moment.generators)
        x_t = process.add_noise(batch.x0, noise_like(batch.x0, moment), t)
        scales = roles.scales(self.guidance_scale, count, moment.generators)
        path = roles.guided("teacher", batch.condition, scales)(x_t, t)
        warmup = min(1.0, moment.step / self.warmup_steps) if self.warmup_steps else 1.0
        tangent = Tangent(process, self.difference, self.tangent_c)
        with roles.paired_noise():
            loss = tangent(roles.denoiser("student", batch.condition), path, x_t, t, warmup=warmup)
        yield Loss("tangent", "student", loss)
