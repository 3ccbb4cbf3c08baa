"""The tangent of the simplified continuous-time consistency model, sCM, by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...samplers.errors import InputError
from ...samplers.linear import combine
from ...samplers.process import Process
from ..distances import wide
from ..jumps import Denoiser
from ..predict import Prediction


def circle_velocity(process: Process, denoise: Denoiser) -> Callable[[Tensor, Tensor], Tensor]:
    """The network F of TrigFlow (arXiv:2410.11081) that a network of any process is: (z, angle) to dz/dangle.

    Any x_t = alpha x0 + sigma eps is, divided by sqrt(alpha^2 + sigma^2), a point z = cos(a) x0 + sin(a) eps of the
    circle with tan(a) = sigma/alpha, and the prediction there gives F = cos(a) eps - sin(a) x0. The paper's sigma_d is
    1 here: data are taken to be scaled to about unit variance, as latents are.
    """

    def velocity(z: Tensor, angle: Tensor) -> Tensor:
        t = process.time_of_log_snr(-2 * angle.tan().log())
        x = combine(z, (torch.hypot(process.alpha(t), process.sigma(t)), z))
        x0, eps = denoise(x, t)
        return combine(wide(z), (angle.cos(), eps), (-angle.sin(), x0))

    return velocity


@dataclass(frozen=True)
class Tangent:
    """The loss of sCM, algorithm 1 of arXiv:2410.11081, with dF/da by a central difference along the path.

    With z = x / sqrt(alpha^2 + sigma^2), angle a, F the student's velocity, f = cos(a) z - sin(a) F its map to clean
    data, and F- without gradient::

        g = -cos^2(a) (F- - dz/da) - warmup cos(a) sin(a) (z + dF-/da),   then g / (||g|| + c)
        loss = exp(-v) / D ||F - F- - g||^2 + v

    g is cos(a) df/da, and vanishes where f is constant along the path: at the consistency function. The paper's prior
    weight 1 / tan(a) is in it; diffusers' Sana-Sprint script divides the loss by tan(a) once more. v is an optional
    learned log-variance, the paper's with the other sign. ||g|| is over the whole sample, as both have it.

    Args:
        process: the noise levels.
        step: half the angle of the difference, in (0, 0.1); the times that the network is told differ by about
            its share of a quarter circle. Below 1e-3 float32 rounding shows, for bfloat16 networks take 1e-2 or more.
        c: what is added to the norm, above 0; infinity takes g as it is.
    """

    process: Process
    step: float = 2e-3
    c: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.step < 0.1:
            raise InputError(f"step of the tangent must be above 0 and below 0.1; got {self.step}")
        if not self.c > 0:
            raise InputError(f"c of the tangent must be positive; got {self.c}")

    def __call__(
        self,
        student: Denoiser,
        path: Prediction,
        x: Tensor,
        t: Tensor,
        *,
        warmup: float = 1.0,
        log_variance: Tensor | None = None,
    ) -> Tensor:
        """The loss of each sample, (B,), at least float32.

        Args:
            student: asked once with gradient, three times without.
            path: at (x, t): the teacher's guided prediction (distillation), or data and noise (training).
            x: states (B, ...) at ``t``.
            t: (B,), with noise, and data left.
            warmup: 0 to 1, the share of the tangent's unstable part: r = min(1, step / H) of the paper.
            log_variance: v, (B,), with gradient; None for 0.

        Raises:
            InputError: when shapes disagree or a time is not permitted.
        """
        z, angle = self._on_circle(x, t)
        velocity = circle_velocity(self.process, student)
        predicted = velocity(z, angle)
        g = self.direction(student, path, x, t, warmup=warmup)
        if not math.isinf(self.c):
            norm = torch.linalg.vector_norm(g.flatten(1), dim=1).view(-1, *(1,) * (g.ndim - 1))
            g = g / (norm + self.c)
        loss = (predicted - predicted.detach() - g).flatten(1).square().mean(dim=1)
        return loss if log_variance is None else loss * (-log_variance).exp() + log_variance

    @torch.no_grad()
    def direction(self, student: Denoiser, path: Prediction, x: Tensor, t: Tensor, *, warmup: float = 1.0) -> Tensor:
        """g before it is normalised, shape of x. Arguments as in the call."""
        z, angle = self._on_circle(x, t)
        velocity = circle_velocity(self.process, student)
        cos, sin = angle.cos(), angle.sin()
        along = combine(z, (cos, path.eps), (-sin, path.x0))
        before, after = self._around(angle)
        width = 1 / (after - before)
        ahead, behind = (
            velocity(combine(z, (torch.ones_like(angle), z), (end - angle, along)), end) for end in (after, before)
        )
        return combine(
            z,
            (cos**2, along),
            (-(cos**2), velocity(z, angle)),
            (-warmup * cos * sin, z),
            (-warmup * cos * sin * width, ahead),
            (warmup * cos * sin * width, behind),
        )

    def _on_circle(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        x = wide(x)
        return combine(x, (1 / torch.hypot(alpha, sigma), x)), torch.atan2(sigma, alpha)

    def _around(self, angle: Tensor) -> tuple[Tensor, Tensor]:
        """Two angles about ``step`` off, within the process's own, and with noise and data left in both."""
        ends = [float(torch.atan2(self.process.sigma(end), self.process.alpha(end))) for end in self.process.time_range]
        before = torch.maximum(angle - self.step, angle / 2).clamp(min=min(ends))
        after = torch.minimum(angle + self.step, (angle + math.pi / 2) / 2).clamp(max=max(ends))
        return before, after
