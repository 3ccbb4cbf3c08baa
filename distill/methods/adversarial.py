"""What the methods share that have a discriminator."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field, field_validator

from ..adversary import DISC, Adversary
from ..method import Method, Moment
from ..schedule import Schedule
from ..sources import Batch
from ..team import Team
from ..terms import GAN_LOSSES
from ..times import UniformTimes


class Adversarial(Method):
    """A method with heads on the teacher's features."""

    gan_loss: str = Field(default="softplus", description="hinge, saturating-hinge, softplus or least-squares.")
    feature_maps: int = Field(default=1, ge=1, description="Blocks of the teacher that the discriminator looks at.")
    disc_rate: float = Field(
        default=1.0, gt=0, description="Learning rate of the discriminator as a multiple of the student's."
    )

    disc_noise: float = Field(
        default=1.0, gt=0, le=1, description="Most noise that the discriminator looks through, as a fraction of times."
    )

    @field_validator("gan_loss")
    @classmethod
    def _known_loss(cls, name: str) -> str:
        GAN_LOSSES[name]
        return name

    def with_disc_rate(self, schedule: Schedule) -> Schedule:
        """A schedule in which the discriminator learns at its own rate.

        Its heads begin at random: at a student's low rate they tell nothing apart for hundreds of updates.
        """
        return replace(schedule, rates={**schedule.rates, DISC: self.disc_rate})

    def adversary(self, batch: Batch, roles: Team, moment: Moment) -> Adversary:
        """The discriminator of a turn."""
        levels = UniformTimes(0.0, self.disc_noise)
        return Adversary(roles, batch.condition, moment, self.feature_maps, GAN_LOSSES[self.gan_loss](), levels)
