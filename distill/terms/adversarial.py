"""Adversarial losses, and a discriminator of small heads over the features of a frozen network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from ...samplers.errors import InputError
from ...samplers.registry import Registry
from ..distances import wide


class GANLoss(ABC):
    """A pair of losses on logits (B, ...), of which each sample's are averaged. High logits mean real."""

    @abstractmethod
    def generator(self, fake: Tensor) -> Tensor:
        """The student's loss of each sample, (B,), at least float32, from the logits of what it made."""

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """The discriminator's loss of each pair, (B,), at least float32; ``fake`` of samples that are detached."""


GAN_LOSSES: Registry[type[GANLoss]] = Registry("adversarial loss")


@GAN_LOSSES.register("hinge")
@dataclass(frozen=True)
class Hinge(GANLoss):
    """relu(1 - real) + relu(1 + fake), and -fake for the student (arXiv:1705.02894); ADD, LADD, Sana-Sprint."""

    def generator(self, fake: Tensor) -> Tensor:
        return _mean(-wide(fake))

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return _mean(relu(1 - wide(real))) + _mean(relu(1 + wide(fake)))


@GAN_LOSSES.register("saturating-hinge")
@dataclass(frozen=True)
class SaturatingHinge(Hinge):
    """The hinge whose student rests where it is taken for real by a margin: relu(1 - fake), as PCM's code has it."""

    def generator(self, fake: Tensor) -> Tensor:
        return _mean(relu(1 - wide(fake)))


@GAN_LOSSES.register("softplus")
@dataclass(frozen=True)
class Softplus(GANLoss):
    """The non-saturating loss, softplus(-real) + softplus(fake), and softplus(-fake) (arXiv:1406.2661); DMD2."""

    def generator(self, fake: Tensor) -> Tensor:
        return _mean(softplus(-wide(fake)))

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return _mean(softplus(-wide(real))) + _mean(softplus(wide(fake)))


@GAN_LOSSES.register("least-squares")
@dataclass(frozen=True)
class LeastSquares(GANLoss):
    """(1 - real)^2 + fake^2, and (1 - fake)^2 (arXiv:1611.04076)."""

    def generator(self, fake: Tensor) -> Tensor:
        return _mean((1 - wide(fake)).square())

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return _mean((1 - wide(real)).square()) + _mean(wide(fake).square())


class FeatureHeads(nn.Module):
    """A discriminator: one head of two layers at every position of each feature map.

    The heads are 0 at first: nothing is real or fake, and the student is not pushed before they have learned.

    Args:
        channels: of each feature map, in order.
        hidden: width of the heads.
    """

    def __init__(self, channels: Sequence[int], hidden: int = 64) -> None:
        super().__init__()
        if not channels:
            raise InputError("a discriminator needs at least one feature map; got none")
        self.channels = tuple(channels)
        self.heads = nn.ModuleList(self._head(width, hidden) for width in channels)

    @staticmethod
    def _head(width: int, hidden: int) -> nn.Sequential:
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), last)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, positions of all maps).

        Args:
            features: tokens (B, L, C), or maps (B, C, ...) of two dimensions or more.

        Raises:
            InputError: when number or channels of the features are not those the heads were made for.
        """
        tokens = [value if value.ndim == 3 else value.flatten(2).transpose(1, 2) for value in features]
        found = tuple(value.shape[2] for value in tokens)
        if found != self.channels:
            raise InputError(f"the discriminator was made for features of {self.channels} channels; got {found}")
        logits = [head(value).squeeze(2) for head, value in zip(self.heads, tokens, strict=True)]
        return torch.cat(logits, dim=1)


def _mean(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(dim=1)
