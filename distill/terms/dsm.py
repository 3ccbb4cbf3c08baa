"""Denoising score matching: a critic learns the scores of what the student makes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..jumps import Denoiser
from ..predict import Prediction
from .regression import Regression


@dataclass(frozen=True)
class DSM:
    """weight(t) d(q(critic; x_t, t), q(x, noise)) with x_t the student's sample x under noise, arXiv:2006.11239.

    Its minimiser is the posterior mean, E[q | x_t], under the student's law. VSD and DMD train their fake network
    so: SwiftBrush (arXiv:2312.05239) and DMD2 (arXiv:2405.14867) with the quantity ``epsilon``.

    Args:
        regression: quantity, distance and weight; l2, or the minimiser is another.
    """

    regression: Regression

    def __call__(self, critic: Denoiser, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The loss of each sample, (B,), at least float32. Its gradient reaches the critic alone.

        Args:
            critic: asked at (x_t, t) with gradient.
            x: the student's samples (B, ...).
            noise: standard normal, shape of x.
            t: (B,).

        Raises:
            InputError: when shapes disagree or a time is not permitted.
        """
        x = x.detach()
        return self.regression(critic, self.regression.process.add_noise(x, noise, t), t, Prediction(x, noise))
