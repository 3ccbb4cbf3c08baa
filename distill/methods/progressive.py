"""Progressive distillation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from ...samplers import Plan
from ...samplers.errors import InputError
from ...samplers.process import Process
from ..deploy import landing_plan, spread
from ..method import METHODS, Loss, Method, Moment
from ..role_kinds import Ema, Kind
from ..schedule import Schedule, Stage
from ..solvers import DDIM
from ..sources import Batch
from ..spans import even_points
from ..team import Team, noise_like
from ..terms import Regression, progressive_goal, truncated_snr


@METHODS.register("progressive")
class Progressive(Method):
    """Progressive distillation (arXiv:2202.00512 algorithm 2): one step of the student is two of its teacher.

    Each stage halves the steps; at its end the student becomes the teacher, and its optimiser and learning rate begin
    anew. As in stage two of arXiv:2210.03142 guidance is distilled too, here in the first stage, whose teacher is the
    guided network; later teachers have it in their weights. Times are even in the pipeline's own spacing, and the last
    step ends at clean data.

    The run has to last ``stage_steps`` for each stage. Networks that predict noise say little of clean data at the
    first step, where the paper has others.
    """

    type: Literal["progressive"] = "progressive"
    teacher_steps: int = Field(default=64, ge=2, description="DDIM steps of the first teacher.")
    final_steps: int = Field(default=1, ge=1, description="Steps of the student of the last stage.")
    stage_steps: int = Field(default=1000, ge=1, description="Updates of each stage.")
    guidance_scale: tuple[float, ...] = Field(
        default=(), max_length=1, description="Of the first teacher; none for the pipeline's."
    )

    @model_validator(mode="after")
    def _halves(self) -> Progressive:
        ratio, rest = divmod(self.teacher_steps, self.final_steps)
        if rest or ratio < 2 or ratio & (ratio - 1):
            raise ValueError(
                f"teacher_steps must be final_steps times 2, 4, 8, ...; got {self.teacher_steps} and {self.final_steps}"
            )
        return self

    @property
    def stages(self) -> int:
        """How often the steps are halved."""
        return (self.teacher_steps // self.final_steps).bit_length() - 1

    @property
    def least_updates(self) -> int:
        """Those of all stages."""
        return self.stages * self.stage_steps

    def kinds(self, student: Kind, network: nn.Module) -> Mapping[str, Kind]:
        """The student, and a copy of it that stays as it was when its stage began."""
        return {"student": student, "teacher": Ema("student")}

    def turns(self) -> Schedule:
        """The student in every turn, in stages of equal length."""
        later = (Stage(start=stage * self.stage_steps, fresh=("student",)) for stage in range(1, self.stages))
        return Schedule((Stage(), *later), anneal_stages=True)

    def enter_stage(self, stage: int, roles: Team) -> None:
        """The student becomes the teacher."""
        roles.update_ema("teacher", 0.0)

    def points(self, process: Process) -> tuple[float, ...]:
        """Clean data, and the times of the first teacher."""
        return process.clean_time, *even_points(process, self.teacher_steps)[1:]

    def plan(self, process: Process, steps: int) -> Plan:
        """DDIM at the times of the last stage.

        Raises:
            InputError: for other numbers of steps than it was trained for.
        """
        if steps != self.final_steps:
            raise InputError(f"the student was distilled to final_steps={self.final_steps}; got {steps} steps")
        return landing_plan(process, spread(self.points(process), steps))

    def losses(self, batch: Batch, roles: Team, moment: Moment) -> Iterator[Loss]:
        """The regression, from a time of the stage's grid."""
        assert batch.x0 is not None
        process, width = roles.process, 2 ** (moment.stage + 1)
        points = torch.tensor(self.points(process), dtype=torch.float64)
        draw = torch.stack([torch.randint(self.teacher_steps // width, (), generator=g) for g in moment.generators])
        end = draw * width
        t, middle, s = points[end + width], points[end + width // 2], points[end]
        x_t = process.add_noise(batch.x0, noise_like(batch.x0, moment), t)
        scale = roles.scales(self.guidance_scale, len(batch), moment.generators) if moment.stage == 0 else 1.0
        teacher = roles.guided("teacher", batch.condition, scale, frozen=True)
        x_s = DDIM()(process, teacher, x_t, t, middle, s)
        goal = progressive_goal(process, x_t, t, x_s, s)
        student = roles.denoiser("student", batch.condition)
        yield Loss("regression", "student", Regression(process, weight=truncated_snr)(student, x_t, t, goal))
