"""Reflow: straight paths between the noise and the samples that a teacher coupled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from ...samplers import Plan
from ...samplers.prediction import Sample
from ...samplers.process import Process
from ..deploy import landing_plan
from ..method import METHODS, Loss, Method, Moment, Needs
from ..predict import Prediction
from ..role_kinds import Kind
from ..schedule import Schedule
from ..sources import Batch
from ..spans import even_points
from ..team import Team
from ..terms import Regression
from ..times import LogitNormalTimes, UniformTimes


@METHODS.register("reflow")
class Reflow(Method):
    """Reflow of rectified flows (arXiv:2209.03003 algorithm 1), for any process.

    Between the ends of a pair x_t = alpha x0 + sigma eps, where eps is such that the path begins where the teacher
    began. x / (alpha + sigma) goes along a straight line there, whose velocity by its own time sigma / (alpha + sigma)
    is eps - x0: the regression is that of rectified flow, and a step of the deployed scheduler is Euler's along it.

    The paper's pairs are those of a fine solver. On ``fashion-dit`` a searched plan of five steps (``--teacher``) makes
    better ones: 8,192 of them and 1,500 updates give 8.2, 5.8, 4.8 and 4.4 (+- 0.3 to 0.4) in 1, 2, 4 and 8 steps
    without guidance, where the teacher has 6.5 +- 0.5 in 50 with it.
    """

    needs: ClassVar[Needs] = "pairs"

    type: Literal["reflow"] = "reflow"
    times: Literal["uniform", "logit-normal"] = Field(
        default="uniform", description="Law of the times, in the scheduler's own spacing."
    )

    def kinds(self, student: Kind, network: nn.Module) -> Mapping[str, Kind]:
        """The student alone: what its teacher knows is in the pairs."""
        return {"student": student}

    def turns(self) -> Schedule:
        """The student in every turn."""
        return Schedule()

    def plan(self, process: Process, steps: int) -> Plan:
        """Euler along the straight path, in any number of steps."""
        return landing_plan(process, even_points(process, steps)[:0:-1])

    def losses(self, batch: Batch, roles: Team, moment: Moment) -> Iterator[Loss]:
        """The regression of the velocity."""
        process, pair = roles.process, coupled(roles.process, batch)
        law = UniformTimes() if self.times == "uniform" else LogitNormalTimes()
        t = law(process, len(batch), moment.generators)
        x_t = process.add_noise(pair.x0, pair.eps, t)
        student = roles.denoiser("student", batch.condition)
        yield Loss("velocity", "student", Regression(process, "flow_prediction")(student, x_t, t, pair))


def coupled(process: Process, batch: Batch) -> Prediction:
    """Both ends of pairs: the samples, and the noise with which the noisiest state is that where the teacher began."""
    assert batch.x0 is not None
    assert batch.start is not None
    to_eps = replace(process, prediction=Sample()).to_eps
    return Prediction(batch.x0, to_eps(batch.x0, batch.start, process.time_range.noisiest))
