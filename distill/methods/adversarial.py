"""What the methods share that have a discriminator."""

from __future__ import annotations

from pydantic import Field, field_validator

from ..adversary import Adversary
from ..method import Method, Moment
from ..sources import Batch
from ..team import Team
from ..terms import GAN_LOSSES


class Adversarial(Method):
    """A method with heads on the teacher's features."""

    gan_loss: str = Field(default="softplus", description="hinge, saturating-hinge, softplus or least-squares.")
    feature_maps: int = Field(default=1, ge=1, description="Blocks of the teacher that the discriminator looks at.")

    @field_validator("gan_loss")
    @classmethod
    def _known_loss(cls, name: str) -> str:
        GAN_LOSSES[name]
        return name

    def adversary(self, batch: Batch, roles: Team, moment: Moment) -> Adversary:
        """The discriminator of a turn."""
        return Adversary(roles, batch.condition, moment, self.feature_maps, GAN_LOSSES[self.gan_loss]())
