"""Consistency distillation with an adversary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...samplers.process import Process
from ..adversary import DISC, heads_on
from ..method import METHODS, Loss, Moment
from ..predict import Prediction
from ..role_kinds import Kind
from ..schedule import Schedule, Stage
from ..sources import Batch
from ..spans import GridSpans, SpanLaw
from ..team import Team
from .adversarial import Adversarial
from .matching import Distilling
from .multistep import MultistepOnGrid


@METHODS.register("adversarial-consistency")
class AdversarialConsistency(MultistepOnGrid, Distilling, Adversarial):
    """Latent consistency distillation whose jumps also pass for data, as OSV's second stage (arXiv:2409.11367).

    The discriminator is heads on the frozen teacher, which is shown the student's jump and the data under new noise.
    What is real is the data: PCM's code takes the consistency target for it, which the student already matches. Both
    learn in every turn from one jump; discriminators on images or on DINO's features need a decoder, these do not.

    Heads begin at random and find nothing at the student's low rate, nor in more noise than half of the times. On
    ``fashion-dit`` 250 updates from an ``lcm`` student take 0.7 +- 0.1 off its distance in one step, at the student's
    rate and in all noise 0.3.
    """

    type: Literal["adversarial-consistency"] = "adversarial-consistency"
    target_decay: float | None = Field(
        default=0.95, ge=0, lt=1, description="Of the average that is the target; none for the student itself."
    )
    gan_weight: float = Field(default=0.1, gt=0, description="Of the adversarial term beside the match.")
    gan_loss: str = Field(default="hinge", description="hinge, saturating-hinge, softplus or least-squares.")
    feature_maps: int = Field(default=4, ge=1, description="Blocks of the teacher that the discriminator looks at.")
    disc_rate: float = Field(
        default=20.0, gt=0, description="Learning rate of the discriminator as a multiple of the student's."
    )
    disc_noise: float = Field(
        default=0.5, gt=0, le=1, description="Most noise that the discriminator looks through, as a fraction of times."
    )

    def spans(self, process: Process, moment: Moment) -> SpanLaw:
        """Neighbours on the grid, and clean data."""
        return GridSpans(self.points(process))

    def kinds(self, student: Kind, network: nn.Module) -> Mapping[str, Kind]:
        """Those of the consistency distillation, and the discriminator's heads."""
        return {**super().kinds(student, network), DISC: heads_on(network, self.feature_maps)}

    def turns(self) -> Schedule:
        """Student and discriminator in every turn."""
        return self.with_disc_rate(replace(super().turns(), stages=(Stage((("student", DISC),)),)))

    def losses(self, batch: Batch, roles: Team, moment: Moment) -> Iterator[Loss]:
        """The match and the adversarial term on the same jump, and the discriminator's."""
        assert batch.x0 is not None
        jumps: list[Tensor] = []
        online = roles.denoiser("student", batch.condition)

        def student(x: Tensor, t: Tensor) -> Prediction:
            prediction = online(x, t)
            clean = torch.full_like(t, roles.process.clean_time)
            jumps.append(self.jump(roles.process)(roles.process, x, t, clean, prediction))
            return prediction

        match = self.match(batch, roles, moment, student)
        adversary = self.adversary(batch, roles, moment)
        gan = adversary.student(jumps[0])
        parts = {"match": match.detach(), "gan": gan.detach()}
        yield Loss("jump", "student", match + self.gan_weight * gan, parts)
        yield Loss("gan", DISC, adversary.discriminator(batch.x0, jumps[0].detach()))
