"""Noise levels against the time a network is told: alpha(t), sigma(t) and their inverse, in float64."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError


class Levels(NamedTuple):
    """The two coefficients of x_t = alpha x0 + sigma eps, float64, with the shape and device of the time."""

    alpha: Tensor
    sigma: Tensor


class TimeRange(NamedTuple):
    """Times between which the scheduler itself calls the network, in the scheduler's unit."""

    cleanest: float
    noisiest: float


class NoiseSchedule(ABC):
    """Noise levels against time. Times are float64 tensors here; `Process` does the checks and the casts."""

    @property
    @abstractmethod
    def clean_time(self) -> float:
        """The time that stands for clean data, where alpha = 1 and sigma = 0."""

    @property
    @abstractmethod
    def time_range(self) -> TimeRange:
        """Cleanest and noisiest time of the scheduler's own grids."""

    @property
    @abstractmethod
    def domain(self) -> str:
        """The permitted times in words, for error messages."""

    @abstractmethod
    def valid(self, t: Tensor) -> Tensor:
        """Bool tensor of the shape of ``t``: is it a permitted time? NaN is not."""

    @abstractmethod
    def levels(self, t: Tensor) -> Levels:
        """Both coefficients at permitted times; differentiable in ``t``."""

    @abstractmethod
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The time at which 2 log(alpha/sigma) has the given value."""

    @abstractmethod
    def from_uniform(self, u: Tensor) -> Tensor:
        """The time at fraction ``u`` (0 cleanest, 1 noisiest) of the scheduler's own spacing rule."""

    def input_scale(self, t: Tensor) -> Tensor:
        """Factor between the state x_t and what the network is fed."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class TableSchedule(NoiseSchedule):
    """Variance preserving, from a table: alpha^2 = alphas_cumprod and alpha^2 + sigma^2 = 1.

    Time is the index into the table, 0 to N-1; -1 is clean data, as in the last step of DDIM. Between
    integers log-SNR is linear in time (what k-diffusion and diffusers' ``_sigma_to_t`` assume), so integers
    are exact. A table that ends at zero SNR (arXiv:2305.08891) has no finite log-SNR there: in its last
    interval alpha is linear instead.

    Args:
        alphas_cumprod: N >= 3 values inside (0, 1) that never increase. The last may be exactly 0; it may
            also exceed its neighbour, and then has no inverse: several schedulers of diffusers end a zero-
            SNR table with 2^-24, which for linear betas is less noise than the entries before.
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if len(table) < 3:
            raise InputError(f"alphas_cumprod has {len(table)} values; a noise schedule needs at least 3")
        for index, value in enumerate(table):
            if not (0 < value < 1 or (value == 0 and index == len(table) - 1)):
                raise InputError(f"alphas_cumprod must lie inside (0, 1); got {value} at index {index}, mend the betas")
            if 0 < index < len(table) - 1 and value > table[index - 1]:
                raise InputError(
                    f"alphas_cumprod must not increase; got {value} after {table[index - 1]} "
                    f"at index {index}, mend the betas"
                )

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether alpha is exactly 0 at the last time."""
        return self.alphas_cumprod[-1] == 0

    @property
    def clean_time(self) -> float:
        return -1.0

    @property
    def time_range(self) -> TimeRange:
        return TimeRange(0.0, len(self.alphas_cumprod) - 1.0)

    @property
    def domain(self) -> str:
        return f"0 to {len(self.alphas_cumprod) - 1}, or -1 for clean data"

    @cached_property
    def _log_snr(self) -> Tensor:
        """Finite log-SNR values of the table (all but the last where that is zero SNR)."""
        table = torch.tensor(self.alphas_cumprod, dtype=torch.float64)
        return torch.logit(table[:-1] if self.zero_terminal_snr else table)

    @property
    def _last_alpha(self) -> float:
        """The alpha with which the last interval begins."""
        return math.sqrt(self.alphas_cumprod[-2])

    def valid(self, t: Tensor) -> Tensor:
        return ((t >= 0) & (t <= self.time_range.noisiest)) | (t == self.clean_time)

    def levels(self, t: Tensor) -> Levels:
        table = self._log_snr.to(t.device)
        u = t.clamp(0, len(table) - 1)
        lower = u.detach().floor().clamp(max=len(table) - 2)
        index = lower.long()
        # take, because indexing with a tensor () copies it to the host first.
        log_snr = torch.lerp(table.take(index), table.take(index + 1), u - lower)
        alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        if self.zero_terminal_snr:
            end = self.time_range.noisiest
            line = self._last_alpha * (end - t).clamp(0, 1)
            alpha = torch.where(t > end - 1, line, alpha)
            sigma = torch.where(t > end - 1, (1 - line**2).sqrt(), sigma)
        clean = t < 0
        return Levels(torch.where(clean, 1.0, alpha), torch.where(clean, 0.0, sigma))

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        noise = -self._log_snr.to(log_snr.device)
        if self.alphas_cumprod[-1] > self.alphas_cumprod[-2]:
            noise = noise[:-1]
        upper = torch.searchsorted(noise, -log_snr).clamp(1, len(noise) - 1)
        start = noise.take(upper - 1)
        width = noise.take(upper) - start
        part = (-log_snr - start) / torch.where(width > 0, width, 1.0)
        t = upper - 1 + part.clamp(0, 1)
        if self.zero_terminal_snr:
            line = self.time_range.noisiest - log_snr.sigmoid().sqrt() / self._last_alpha
            t = torch.where(-log_snr > noise[-1], line, t)
        return torch.where(log_snr == math.inf, self.clean_time, t)

    def from_uniform(self, u: Tensor) -> Tensor:
        return u * self.time_range.noisiest


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Rectified flow (arXiv:2209.03003): alpha = 1 - sigma, time = num_train_timesteps * sigma.

    Args:
        num_train_timesteps: the time of pure noise.
        shift: how ``from_uniform`` spends time on noisy levels (it does not move alpha or sigma); None when
            it depends on the resolution and has not been set.
        shift_of_mu: the shift a resolution's ``mu`` stands for: ``math.exp``, or ``float`` for the linear
            rule.
    """

    num_train_timesteps: int = 1000
    shift: float | None = 1.0
    shift_of_mu: Callable[[float], float] = field(default=math.exp, repr=False)

    def __post_init__(self) -> None:
        if self.shift is not None and not 0 < self.shift < math.inf:
            raise InputError(f"shift must be positive and finite; got {self.shift}")

    @property
    def clean_time(self) -> float:
        return 0.0

    @property
    def time_range(self) -> TimeRange:
        return TimeRange(0.0, float(self.num_train_timesteps))

    @property
    def domain(self) -> str:
        return f"0 to {self.num_train_timesteps}"

    def valid(self, t: Tensor) -> Tensor:
        return (t >= 0) & (t <= self.num_train_timesteps)

    def levels(self, t: Tensor) -> Levels:
        sigma = t / self.num_train_timesteps
        return Levels(1 - sigma, sigma)

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """The time of a noise level in [0, 1]."""
        return self.num_train_timesteps * sigma

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.time_of_sigma((-log_snr / 2).sigmoid())

    def from_uniform(self, u: Tensor) -> Tensor:
        if self.shift is None:
            raise InputError("this scheduler shifts by resolution; set the shift with process.with_mu(mu) first")
        return self.time_of_sigma(self.shift * u / (1 + (self.shift - 1) * u))


@dataclass(frozen=True)
class InvertedFlowSchedule(FlowSchedule):
    """Rectified flow whose time runs towards data, num_train_timesteps * (1 - sigma), as Mochi has it."""

    @property
    def clean_time(self) -> float:
        return float(self.num_train_timesteps)

    @property
    def time_range(self) -> TimeRange:
        return TimeRange(self.clean_time, 0.0)

    def levels(self, t: Tensor) -> Levels:
        alpha = t / self.num_train_timesteps
        return Levels(alpha, 1 - alpha)

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        return self.num_train_timesteps * (1 - sigma)


@dataclass(frozen=True)
class EDMSchedule(NoiseSchedule):
    """Variance exploding (arXiv:2206.00364, table 1): alpha = 1, time = log(sigma) / 4.

    Args:
        sigma_min: smallest noise level of the scheduler's grids.
        sigma_max: largest noise level of the scheduler's grids; any finite time may be asked for.
        sigma_data: standard deviation of the data that the network scaling assumes.
        rho: exponent of the spacing rule (equation 5); ``math.inf`` spaces log sigma evenly.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0

    @property
    def clean_time(self) -> float:
        return -math.inf

    @property
    def time_range(self) -> TimeRange:
        ends = torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64)
        return TimeRange(*self.time_of_sigma(ends).tolist())

    @property
    def domain(self) -> str:
        return "any log(sigma)/4 below infinity, -infinity for clean data"

    def valid(self, t: Tensor) -> Tensor:
        return t < math.inf

    def levels(self, t: Tensor) -> Levels:
        return Levels(torch.ones_like(t), torch.exp(4 * t))

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """The time of a noise level, c_noise of the paper."""
        return sigma.log() / 4

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.time_of_sigma(torch.exp(-log_snr / 2))

    def from_uniform(self, u: Tensor) -> Tensor:
        if math.isinf(self.rho):
            return self.time_of_sigma(self.sigma_min * (self.sigma_max / self.sigma_min) ** u)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return self.time_of_sigma((low + u * (high - low)) ** self.rho)

    def input_scale(self, t: Tensor) -> Tensor:
        return (self.levels(t).sigma ** 2 + self.sigma_data**2).rsqrt()


@dataclass(frozen=True)
class ArctanEDMSchedule(EDMSchedule):
    """EDM whose network is told 2/pi arctan(sigma), in [0, 1), as Stable Audio has it (arXiv:2407.14358)."""

    @property
    def clean_time(self) -> float:
        return 0.0

    @property
    def domain(self) -> str:
        return "0 to below 1"

    def valid(self, t: Tensor) -> Tensor:
        return (t >= 0) & (t < 1)

    def levels(self, t: Tensor) -> Levels:
        return Levels(torch.ones_like(t), torch.tan(t * (math.pi / 2)))

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma.atan() * (2 / math.pi)


@dataclass(frozen=True)
class TrigSchedule(NoiseSchedule):
    """The quarter circle: alpha = cos(pi t / 2), sigma = sin(pi t / 2), with t in [0, 1]."""

    @property
    def clean_time(self) -> float:
        return 0.0

    @property
    def time_range(self) -> TimeRange:
        return TimeRange(0.0, 1.0)

    @property
    def domain(self) -> str:
        return "0 to 1"

    def valid(self, t: Tensor) -> Tensor:
        return (t >= 0) & (t <= 1)

    def levels(self, t: Tensor) -> Levels:
        # The sine of the complement is the cosine, and exactly 0 at t = 1.
        return Levels(torch.sin((1 - t) * (math.pi / 2)), torch.sin(t * (math.pi / 2)))

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-log_snr / 2).atan() * (2 / math.pi)

    def from_uniform(self, u: Tensor) -> Tensor:
        return u
