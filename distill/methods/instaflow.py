"""One step from noise to the samples that a teacher coupled with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from torch import nn

from ...samplers import Plan
from ...samplers.errors import InputError
from ...samplers.process import Process
from ..deploy import landing_plan
from ..method import METHODS, Loss, Method, Moment, Needs
from ..role_kinds import Kind
from ..schedule import Schedule
from ..sources import Batch
from ..team import Team
from ..terms import Regression
from .reflow import coupled


@METHODS.register("instaflow")
class InstaFlow(Method):
    """The distillation step of InstaFlow (arXiv:2309.06380): the clean sample of a pair, from its noise at once.

    The paper distils a network that was straightened by ``reflow``, on pairs which that network made, or the step is
    blurred. With enough pairs of a good plan (``--teacher``) it is not: on ``fashion-dit`` 40,960 of a searched plan of
    five steps bring one step to 5.5 +- 0.3, where the teacher has 6.5 +- 0.5 in 50. After 500 updates on 2,048 pairs
    it is at 9.9 +- 0.4, and at 14.5 +- 0.7 with those of the 50 steps, which cost ten times as much.

    The paper ends with a perceptual distance (LPIPS) that is left out here: its features were trained on ImageNet,
    which flatters scores, and it needs decoded images.
    """

    needs: ClassVar[Needs] = "pairs"

    type: Literal["instaflow"] = "instaflow"

    def kinds(self, student: Kind, network: nn.Module) -> Mapping[str, Kind]:
        """The student alone: what its teacher knows is in the pairs."""
        return {"student": student}

    def turns(self) -> Schedule:
        """The student in every turn."""
        return Schedule()

    def plan(self, process: Process, steps: int) -> Plan:
        """One step.

        Raises:
            InputError: for more.
        """
        if steps != 1:
            raise InputError(f"the student was trained for 1 step; got {steps}, use reflow for more")
        return landing_plan(process, [process.time_range.noisiest])

    def losses(self, batch: Batch, roles: Team, moment: Moment) -> Iterator[Loss]:
        """The regression of the clean sample."""
        assert batch.start is not None
        process = roles.process
        t = torch.full((len(batch),), process.time_range.noisiest, dtype=torch.float64)
        student = roles.denoiser("student", batch.condition)
        yield Loss("regression", "student", Regression(process)(student, batch.start, t, coupled(process, batch)))
