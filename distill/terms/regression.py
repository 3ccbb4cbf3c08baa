"""Regression: the student's prediction is a known one. Pairs, reflow, guided and progressive distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ...samplers.linear import combine
from ...samplers.prediction import PREDICTIONS
from ...samplers.process import Process
from ..distances import L2, Distance, wide
from ..jumps import Denoiser
from ..predict import Prediction

#: Factor of a sample's loss from the process and its time: float64 (B,), no gradient.
TimeWeight = Callable[[Process, Tensor], Tensor]


def truncated_snr(process: Process, t: Tensor) -> Tensor:
    """max(SNR, 1), the weight of x0 in progressive distillation (arXiv:2202.00512 section 4); finite for noisy t."""
    return process.snr(t).clamp(min=1)


@dataclass(frozen=True)
class Regression:
    """weight(t) d(q(student; x, t), q(goal)) for a quantity q of predictions.

    ==========================  ==========================  =========================================================
    method                      quantity                    goal
    ==========================  ==========================  =========================================================
    reflow (arXiv:2209.03003)   ``flow_prediction``         (x0, noise) of a pair that the teacher made
    InstaFlow (2309.06380)      ``sample``                  the same, at the time of noise alone
    guided (2210.03142)         the network's own           the teacher's guided prediction at the same state
    progressive (2202.00512)    ``sample``                  `progressive_goal` of two steps of the teacher
    critic                      any                         (x, noise) of the student's sample: `DSM`
    ==========================  ==========================  =========================================================

    Args:
        process: the noise levels.
        quantity: a prediction type of diffusers: sample, epsilon, v_prediction or flow_prediction.
        distance: between the two.
        weight: factor by time; None for 1.

    Raises:
        InputError: when the quantity is not known.
    """

    process: Process
    quantity: str = "sample"
    distance: Distance = field(default_factory=L2)
    weight: TimeWeight | None = None

    def __post_init__(self) -> None:
        PREDICTIONS[self.quantity]

    def __call__(self, student: Denoiser, x: Tensor, t: Tensor, goal: Prediction) -> Tensor:
        """The loss of each sample, (B,), at least float32.

        Args:
            student: asked at (x, t) with gradient.
            x: states (B, ...) at ``t``.
            t: (B,).
            goal: two tensors of the shape of x; no gradient goes there.

        Raises:
            InputError: when shapes disagree or a time is not permitted.
        """
        known = Prediction(goal.x0.detach(), goal.eps.detach())
        loss = self.distance(self._quantity(student(x, t), t), self._quantity(known, t))
        return loss if self.weight is None else loss * self.weight(self.process, t).to(loss)

    def _quantity(self, prediction: Prediction, t: Tensor) -> Tensor:
        of_x0, of_eps = PREDICTIONS[self.quantity].target(self.process.alpha(t), self.process.sigma(t))
        return combine(wide(prediction.x0), (of_x0, prediction.x0), (of_eps, prediction.eps))


def progressive_goal(process: Process, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor) -> Prediction:
    """The prediction at (x_t, t) whose one DDIM step to s lands on x_s, arXiv:2202.00512 appendix G.

    x0 = (x_s - (sigma_s/sigma_t) x_t) / (alpha_s - (sigma_s/sigma_t) alpha_t), and eps from x_t = alpha_t x0 +
    sigma_t eps.

    Args:
        process: the noise levels.
        x_t: states (B, ...) at ``t``.
        t: (B,), with noise.
        x_s: where the teacher's steps lead, shape of x_t.
        s: (B,), another noise level than at ``t``; may be clean.

    Raises:
        InputError: when shapes disagree or a time is not permitted.
    """
    x_t, x_s = wide(x_t), wide(x_s)
    alpha_t, sigma_t, alpha_s, sigma_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
    scale = 1 / (sigma_t * alpha_s - sigma_s * alpha_t)
    x0 = combine(x_t, (sigma_t * scale, x_s), (-sigma_s * scale, x_t))
    eps = combine(x_t, (alpha_s * scale, x_t), (-alpha_t * scale, x_s))
    return Prediction(x0, eps)
