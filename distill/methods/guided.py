"""Distillation of classifier-free guidance: one evaluation a step instead of two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from ...samplers import Plan
from ...samplers.prediction import PREDICTIONS
from ...samplers.process import Process
from ...samplers.schedules import TableSchedule
from ..method import METHODS, Loss, Moment
from ..role_kinds import Base, Kind
from ..schedule import Schedule
from ..sources import Batch
from ..team import Team, noise_like
from ..terms import Regression
from ..times import UniformTimes
from .telling import Telling


@METHODS.register("guided")
class Guided(Telling):
    """Stage one of guided distillation (arXiv:2210.03142): the student predicts what the guided teacher does.

    It is told the guidance scale by a layer that begins at zero, so that it begins as the unguided teacher. The
    distance is that of the network's own output, where the paper weights clean samples by their signal-to-noise ratio:
    for a network that predicts noise the same but for the truncation, and for others no time is left without weight.
    """

    type: Literal["guided"] = "guided"
    embed_guidance: bool = Field(
        default=True, description="Whether the student is told the guidance scale; needs a U-Net that can be told."
    )

    @model_validator(mode="after")
    def _one_scale_is_not_told(self) -> Self:
        if not self.embed_guidance and len(self.guidance_scale) == 2:
            raise ValueError(
                f"without embed_guidance there is one guidance scale; got the range {list(self.guidance_scale)}"
            )
        return self

    @property
    def learns_guidance(self) -> bool:
        """Always."""
        return True

    def kinds(self, student: Kind, network: nn.Module) -> Mapping[str, Kind]:
        """Student and teacher."""
        self.refuse_adapter(student)
        return {"student": student, "teacher": Base()}

    def turns(self) -> Schedule:
        """The student in every turn."""
        return Schedule()

    def plan(self, process: Process, steps: int) -> Plan:
        """Any number of steps: DPM-Solver++ on trailing times of a table, elsewhere the pipeline's own scheduler."""
        grid: dict[str, Any] = {"type": "spacing", "steps": steps}
        if not isinstance(process.schedule, TableSchedule):
            return Plan.from_json({"fewstep_plan": 1, "grid": grid})
        solver = {"type": "diffusers", "scheduler": "DPMSolverMultistepScheduler"}
        return Plan.from_json({"fewstep_plan": 1, "solver": solver, "grid": grid | {"spacing": "trailing"}})

    def losses(self, batch: Batch, roles: Team, moment: Moment) -> Iterator[Loss]:
        """The regression, at data with noise of any time."""
        batch.condition.branch("uncond")  # refuses a pipeline without guidance, which there is nothing to learn from
        batch, roles = self.drawn(batch, roles, moment)
        assert batch.x0 is not None
        process, count = roles.process, len(batch)
        t = UniformTimes()(process, count, moment.generators)
        x_t = process.add_noise(batch.x0, noise_like(batch.x0, moment), t)
        scales = roles.scales(self.guidance_scale, count, moment.generators)
        goal = roles.guided("teacher", batch.condition, scales)(x_t, t)
        student = roles.denoiser("student", batch.condition)
        yield Loss("regression", "student", Regression(process, own_quantity(process))(student, x_t, t, goal))


def own_quantity(process: Process) -> str:
    """What the network predicts, by a name of diffusers; eps - x0 where it has none, which is EDM's but for a factor.

    The factor is between 0.9 and 2 at data of standard deviation 0.5.
    """
    kind = process.prediction_type
    return kind if kind in PREDICTIONS.names() else "flow_prediction"
