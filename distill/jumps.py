"""From a prediction at (x, t) to a point at time s: the map that a student of the consistency family is.

Three parametrisations of one map. `Landing` is the identity at s = t because x is alpha_t x0 + sigma_t eps there. The
other two land on clean data whatever the end of the segment is called, and are the identity at the cleanest time
because a factor of x grows to 1 there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..samplers.linear import as_time, combine, require
from ..samplers.process import Process
from ..samplers.registry import Registry
from .distances import wide
from .predict import Prediction

#: A network with its condition: state (B, ...) and times (B,) in the process's unit to a prediction.
Denoiser = Callable[[Tensor, Tensor], Prediction]


class Jump(ABC):
    """A student's map from (x, t) to time s."""

    @abstractmethod
    def __call__(self, process: Process, x: Tensor, t: Tensor, s: Tensor, prediction: Prediction) -> Tensor:
        """Where the sample is at time ``s``: of the shape of ``x``, at least float32, differentiable.

        Args:
            process: the noise levels.
            x: state (B, ...) at time ``t``.
            t: (B,), times at which the prediction was made.
            s: (B,), times to land at; cleaner or noisier than ``t``.
            prediction: of the student at (x, t).

        Raises:
            InputError: when a time is not permitted.
        """


JUMPS: Registry[type[Jump]] = Registry("jump")


@JUMPS.register("landing")
@dataclass(frozen=True)
class Landing(Jump):
    """x_s = alpha_s x0 + sigma_s eps, the DDIM landing (arXiv:2010.02502 equation 12).

    The hard boundary of PCM (arXiv:2405.18407), TCD (arXiv:2402.19159) and iCD (arXiv:2406.14539): no factor of x.
    """

    def __call__(self, process: Process, x: Tensor, t: Tensor, s: Tensor, prediction: Prediction) -> Tensor:
        return process.jump(wide(x), t, s, x0=prediction.x0, eps=prediction.eps)


@JUMPS.register("lcm")
@dataclass(frozen=True)
class LCMBoundary(Jump):
    """c_skip x + c_out x0 of latent consistency models (arXiv:2310.04378), on clean data: ``s`` is not looked at.

    c_skip = d^2 / (u^2 + d^2) and c_out = u / sqrt(u^2 + d^2), with u = timestep_scaling times the timestep and
    d = sigma_data, as ``LCMScheduler`` deploys them: the values here must be those of the scheduler's config. The
    identity is at timestep 0, though a table has some noise there.

    Args:
        timestep_scaling: factor of the timestep.
        sigma_data: standard deviation of the data, above 0.
    """

    timestep_scaling: float = 10.0
    sigma_data: float = 0.5

    def __call__(self, process: Process, x: Tensor, t: Tensor, s: Tensor, prediction: Prediction) -> Tensor:
        scaled, variance = as_time(t) * self.timestep_scaling, self.sigma_data**2
        skip = variance / (scaled**2 + variance)
        out = scaled * (scaled**2 + variance).rsqrt()
        return combine(wide(x), (skip, x), (out, prediction.x0))


@JUMPS.register("cm")
@dataclass(frozen=True)
class CMBoundary(Jump):
    """c_skip x + c_out F of consistency models (arXiv:2303.01469 appendix C), on clean data; ``s`` is not looked at.

    c_skip = d^2 / ((sigma - sigma_min)^2 + d^2) and c_out = (sigma - sigma_min) d / sqrt(sigma^2 + d^2): the identity
    is at sigma_min. F is the network below EDM's scaling, and x0 = d^2 / (sigma^2 + d^2) x + sigma d / sqrt(...) F
    (arXiv:2206.00364 table 1), so that c_out F = (1 - sigma_min / sigma) (x0 - d^2 / (sigma^2 + d^2) x).

    Args:
        sigma_min: smallest noise level of the grid, above 0.
        sigma_data: standard deviation of the data, above 0.
    """

    sigma_min: float = 0.002
    sigma_data: float = 0.5

    def __call__(self, process: Process, x: Tensor, t: Tensor, s: Tensor, prediction: Prediction) -> Tensor:
        message = "the jump 'cm' is for alpha = 1 (EDM), and here it is less at time {}; use 'landing' or 'lcm'"
        require(process.alpha(t) == 1, t, message)
        sigma, variance = process.sigma(t), self.sigma_data**2
        skip = variance / ((sigma - self.sigma_min) ** 2 + variance)
        of_network = 1 - self.sigma_min / sigma
        edm_skip = variance / (sigma**2 + variance)
        return combine(wide(x), (skip - of_network * edm_skip, x), (of_network, prediction.x0))
