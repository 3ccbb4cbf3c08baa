"""Distribution matching with an adversary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...samplers import Plan
from ...samplers.errors import InputError
from ...samplers.process import Process
from ..adversary import DISC, heads_on
from ..deploy import consistency_plan
from ..method import METHODS, Loss, Moment, Needs
from ..role_kinds import Kind
from ..rollout import check_start
from ..schedule import Schedule
from ..sources import Batch
from ..spans import even_points
from ..team import Team, noise_like
from ..terms import DMD
from ..times import UniformTimes
from .adversarial import Adversarial
from .distribution import Distribution


@METHODS.register("dmd2")
class DMD2(Distribution, Adversarial):
    """DMD2 (arXiv:2405.14867): the gap of DMD, an adversary on data, and a student that simulates its own sampling.

    The fake and the discriminator are updated in every turn, the student in every fifth, as in the paper. Its
    discriminator is a head on the fake, which is trained by it too; here, as in FastGen, it is heads on the frozen
    teacher, so that the fake keeps to the student's scores, and ``gan_weight`` is that of the student's term alone.
    With 0 there is none, and no data are needed.
    """

    type: Literal["dmd2"] = "dmd2"
    fake_updates: int = Field(default=5, ge=1, description="Updates of the fake for each of the student.")
    student_steps: int = Field(default=4, ge=1, description="Steps of the student, at times that are spread evenly.")
    student_times: tuple[float, ...] = Field(
        default=(), description="The times instead, noisiest first, in the scheduler's units."
    )
    gan_weight: float = Field(default=1e-3, ge=0, description="Of the adversarial term; 0 for none, and no data.")

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """Data for the discriminator, where there is one."""
        return "data" if self.gan_weight else "conditions"

    def kinds(self, student: Kind, network: nn.Module) -> Mapping[str, Kind]:
        """Student, teacher, fake, and the discriminator's heads."""
        heads = {DISC: heads_on(network, self.feature_maps)} if self.gan_weight else {}
        return {**super().kinds(student, network), **heads}

    @property
    def critics(self) -> tuple[str, ...]:
        """The fake, and the discriminator where there is one."""
        return ("fake", DISC) if self.gan_weight else ("fake",)

    def turns(self) -> Schedule:
        """The critics in every turn, the student in the last of each cycle."""
        schedule = super().turns()
        return self.with_disc_rate(schedule) if self.gan_weight else schedule

    def times(self, process: Process) -> tuple[float, ...]:
        """The listed times, or evenly spread ones: 999, 749, 499 and 249 on a table of 1000."""
        return self.student_times or tuple(reversed(even_points(process, self.student_steps)[1:]))

    def plan(self, process: Process, steps: int) -> Plan:
        """Multistep consistency sampling: the first of the times, which is how the student was rolled out."""
        times = self.times(process)
        check_start(process, times[0])
        levels = process.log_snr(torch.tensor(times, dtype=torch.float64)).tolist()
        if any(before >= after for before, after in pairwise(levels)):
            raise InputError(f"student_times go from noise to data; got {list(times)}")
        if not 1 <= steps <= len(times):
            raise InputError(f"dmd2 trains a student of 1 to {len(times)} steps; it cannot be sampled in {steps}")
        return consistency_plan(process, times[:steps])

    def gap(self, batch: Batch, roles: Team, moment: Moment, made: Tensor) -> Tensor:
        """The normalised difference of the guided teacher's and the fake's clean samples."""
        t = UniformTimes(0.02, 0.98)(roles.process, len(batch), moment.generators)
        scale = roles.scales(self.guidance_scale, len(batch), moment.generators)
        teacher = roles.guided("teacher", batch.condition, scale)
        fake = roles.denoiser("fake", batch.condition, grad=False, frozen=True)
        return DMD(roles.process)(teacher, fake, made, noise_like(made, moment), t)

    def student_loss(self, batch: Batch, roles: Team, moment: Moment, made: Tensor) -> Loss:
        """The gap, and the adversarial term on the same samples."""
        loss = super().student_loss(batch, roles, moment, made)
        if not self.gan_weight:
            return loss
        gan = self.adversary(batch, roles, moment).student(made)
        value = loss.value + self.gan_weight * gan
        return Loss("distribution", "student", value, {"gap": loss.value.detach(), "gan": gan.detach()})

    def critic_losses(self, batch: Batch, roles: Team, moment: Moment, made: Tensor) -> Iterator[Loss]:
        """The fake's and the discriminator's."""
        yield from super().critic_losses(batch, roles, moment, made)
        if self.gan_weight:
            assert batch.x0 is not None
            yield Loss("gan", DISC, self.adversary(batch, roles, moment).discriminator(batch.x0, made))
