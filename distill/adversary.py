"""A discriminator of noised samples: small heads, the role ``disc``, on features of the frozen teacher."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .conditions import Condition
from .distances import wide
from .features import blocks_to_tap, features_of
from .method import Moment
from .role_kinds import Extra
from .team import Team, noise_like
from .terms import FeatureHeads, GANLoss
from .times import TimeLaw

DISC = "disc"
"The role of the heads."


def heads_on(network: nn.Module, count: int) -> Extra:
    """The discriminator's role: heads for the features of ``count`` blocks of a network.

    Raises:
        InputError: when the network has no blocks that fewstep knows, or the count is below 1.
    """
    return Extra(FeatureHeads([tap.channels for tap in blocks_to_tap(network, count)]))


@dataclass(frozen=True)
class Adversary:
    """A discriminator that sees samples under noise, through the teacher, as LADD's (arXiv:2403.12015).

    What is real is the data. Samples that are compared have the same condition and the same noise level.

    Args:
        team: with the roles ``teacher`` and ``disc``.
        condition: of the samples.
        moment: draws noise, and noise levels.
        count: of blocks whose features the heads were made for.
        loss: of the logits.
        levels: law of the noise levels.
    """

    team: Team
    condition: Condition
    moment: Moment
    count: int
    loss: GANLoss
    levels: TimeLaw

    def student(self, made: Tensor) -> Tensor:
        """The student's loss of each sample, (B,); its gradient reaches the samples alone.

        Args:
            made: clean samples of the student (B, ...), with gradient.
        """
        features = self._features(made, self._times(), grad=True)
        with self.team.roles.use(DISC, frozen=True) as heads:
            return self.loss.generator(heads(features))

    def discriminator(self, real: Tensor, made: Tensor) -> Tensor:
        """The discriminator's loss of each pair, (B,); its gradient reaches the heads alone.

        Args:
            real: clean data (B, ...).
            made: clean samples of the student, shape of ``real``.
        """
        t = self._times()
        features = [self._features(x.detach(), t, grad=False) for x in (real, made)]
        with self.team.roles.use(DISC) as heads:
            return self.loss.discriminator(*(heads(each) for each in features))

    def _times(self) -> Tensor:
        return self.levels(self.team.process, len(self.condition), self.moment.generators)

    def _features(self, x: Tensor, t: Tensor, grad: bool) -> list[Tensor]:
        noised = self.team.process.add_noise(wide(x), noise_like(x, self.moment), t)
        tapped = features_of(self.team, "teacher", self.condition, self.count, grad=grad)
        return [wide(feature) for feature in tapped(noised, t)]
