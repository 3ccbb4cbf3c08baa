"""Score gaps: the student's samples move from where the fake network's scores point to where the teacher's do.

The student makes x, noise is added, and two networks say what they take it for: the teacher R (clean sample) and the
fake network F, a critic that `DSM` keeps at the student's own law. F - R is sigma^2/alpha times the difference of the
two scores. `VSD` and `DMD` put that difference into x as its gradient; `SIM` and `SiD` are losses whose gradient passes
through both networks, which must be frozen then, so that it reaches the student alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ...samplers.errors import InputError
from ...samplers.linear import combine
from ...samplers.process import Process
from ..distances import wide
from ..jumps import Denoiser
from ..predict import Prediction
from .regression import TimeWeight


@dataclass(frozen=True)
class _Gap(ABC):
    """A score gap that becomes the gradient of the student's samples.

    Args:
        process: the noise levels.
    """

    process: Process

    def __call__(self, teacher: Denoiser, fake: Denoiser, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The loss of each sample, (B,), at least float32; its gradient by x is `gradient` / D, and reaches x alone.

        Args:
            teacher: guided or not; asked without gradient.
            fake: the critic; asked without gradient.
            x: the student's samples (B, ...), with gradient.
            noise: standard normal, shape of x.
            t: (B,).

        Raises:
            InputError: when shapes disagree or a time is not permitted.
        """
        x = wide(x)
        goal = (x - self.gradient(teacher, fake, x, noise, t)).detach()
        return 0.5 * (x - goal).flatten(1).square().mean(dim=1)

    @torch.no_grad()
    def gradient(self, teacher: Denoiser, fake: Denoiser, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What x should move against, shape of x. Arguments as in the call."""
        x_t = self.process.add_noise(wide(x), noise, t)
        return self._gap(teacher(x_t, t), fake(x_t, t), x, t).nan_to_num()

    @abstractmethod
    def _gap(self, teacher: Prediction, fake: Prediction, x: Tensor, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class VSD(_Gap):
    """sigma^2 (eps_teacher - eps_fake): variational score distillation as SwiftBrush has it (arXiv:2312.05239)."""

    def _gap(self, teacher: Prediction, fake: Prediction, x: Tensor, t: Tensor) -> Tensor:
        weight = self.process.sigma(t) ** 2
        return combine(wide(teacher.eps), (weight, teacher.eps), (-weight, fake.eps))


@dataclass(frozen=True)
class DMD(_Gap):
    """(F - R) / mean |x - R|, the mean over each sample: DMD (arXiv:2311.18828 equations 7 and 8), and DMD2's code."""

    def _gap(self, teacher: Prediction, fake: Prediction, x: Tensor, t: Tensor) -> Tensor:
        return (fake.x0 - teacher.x0) / _mean_error(x, teacher)


@dataclass(frozen=True)
class SIM:
    """-weight(t) d'(y) . (noise - eps_fake), y = eps_teacher - eps_fake, per element: score implicit matching.

    The loss of arXiv:2410.16794 in units of noise (scores times -sigma), divided by sqrt(D), with the pseudo-Huber
    d'(y) = y / sqrt(||y||^2 + c^2 D). Its expected gradient is that of E[d(y)] by the student, with d(y) =
    sqrt(||y||^2 + c^2 D): a divergence of the two laws that is 0 only where they are equal.

    Args:
        process: the noise levels.
        c: where d turns from square to norm, per element, above 0.
        weight: factor by time; None for 1.
    """

    process: Process
    c: float = 0.01
    weight: TimeWeight | None = None

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise InputError(f"c of score implicit matching must be positive; got {self.c}")

    def __call__(self, teacher: Denoiser, fake: Denoiser, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The loss of each sample, (B,), at least float32; may be negative.

        Args:
            teacher: frozen; asked with gradient by its state.
            fake: the critic, frozen; asked with gradient by its state.
            x: the student's samples (B, ...), with gradient.
            noise: standard normal, shape of x.
            t: (B,).

        Raises:
            InputError: when shapes disagree or a time is not permitted.
        """
        x_t = self.process.add_noise(wide(x), noise, t)
        eps_teacher, eps_fake = teacher(x_t, t).eps, fake(x_t, t).eps
        y = (eps_teacher - eps_fake).flatten(1)
        size = (y.square().mean(dim=1) + self.c**2).sqrt()
        loss = -(y * (wide(noise) - eps_fake).flatten(1)).mean(dim=1) / size
        return loss if self.weight is None else loss * self.weight(self.process, t).to(loss)


@dataclass(frozen=True)
class SiD:
    """(R - F) . ((R - x) - a (R - F)) / mean |x - R|, per element: score identity distillation, arXiv:2404.04057.

    The final loss with the released code's weight. R and F are differentiated by their state.

    Args:
        process: the noise levels.
        a: the paper's alpha. Its experiments have 1 and 1.2.
    """

    process: Process
    a: float = 1.0

    def __call__(self, teacher: Denoiser, fake: Denoiser, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The loss of each sample, (B,), at least float32; may be negative. Arguments as those of `SIM`."""
        x = wide(x)
        x_t = self.process.add_noise(x, noise, t)
        real, made = teacher(x_t, t), fake(x_t, t)
        gap = real.x0 - made.x0
        loss = gap * ((real.x0 - x) - self.a * gap) / _mean_error(x, real)
        return loss.flatten(1).mean(dim=1)


def _mean_error(x: Tensor, teacher: Prediction) -> Tensor:
    """Mean |x - R| of each sample, (B, 1, ...), without gradient."""
    error = (wide(x) - teacher.x0).detach().abs().flatten(1).mean(dim=1)
    return error.view(-1, *(1,) * (x.ndim - 1))
