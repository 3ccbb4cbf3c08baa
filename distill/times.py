"""When a student is trained: laws of one time, and of guidance scales. The three times of a match are in `spans`.

Every draw is one number per sample from one generator per sample, or from one for the whole batch; with one per sample
a sample's times do not depend on what else is in its batch. Times are float64 (B,) on the CPU, in the process's unit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..samplers.errors import InputError
from ..samplers.process import Process
from ..samplers.registry import Registry

#: Where random numbers come from: one generator for the batch, or one per sample.
Draws = torch.Generator | Sequence[torch.Generator]


def uniform(draws: Draws, count: int) -> Tensor:
    """``count`` numbers, even in [0, 1), float64 (count,).

    Raises:
        InputError: when there are generators per sample, and not as many as samples.
    """
    if isinstance(draws, torch.Generator):
        return torch.rand(count, generator=draws, dtype=torch.float64)
    if len(draws) != count:
        raise InputError(f"{count} samples need one generator each, or one for all; got {len(draws)}")
    return torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in draws])


def normal(draws: Draws, count: int) -> Tensor:
    """``count`` standard normal numbers, float64 (count,), by the inverse of their distribution."""
    numbers: Tensor = torch.special.ndtri(uniform(draws, count).clamp(min=2.0**-54))
    return numbers


class TimeLaw(ABC):
    """A law of one time."""

    @abstractmethod
    def __call__(self, process: Process, count: int, draws: Draws) -> Tensor:
        """``count`` times of ``process``, (count,)."""


TIME_LAWS: Registry[type[TimeLaw]] = Registry("law of times")


@TIME_LAWS.register("uniform")
@dataclass(frozen=True)
class UniformTimes(TimeLaw):
    """Even over a range of the scheduler's own spacing: of time on a table, of shifted sigma on flow matching.

    Args:
        low: fraction of the range at its clean end, at least 0. Score distillation has 0.02 (arXiv:2311.18828).
        high: fraction at its noisy end, at most 1.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise InputError(f"low and high must rise within 0 to 1; got {self.low:g} and {self.high:g}")

    def __call__(self, process: Process, count: int, draws: Draws) -> Tensor:
        return process.from_uniform(self.low + (self.high - self.low) * uniform(draws, count))


@TIME_LAWS.register("log-normal")
@dataclass(frozen=True)
class LogNormalTimes(TimeLaw):
    """log(sigma/alpha) is normal, arXiv:2206.00364 section 5; cut off at the ends of the process's times.

    sCM (arXiv:2410.11081) draws log(sigma_d tan) with mean -1.0 and std 1.4; its data have the standard deviation
    sigma_d = 0.5. Where data are scaled to 1, as latents are, the same law has the mean -1.0 - log(0.5).

    Args:
        mean: of log(sigma/alpha).
        std: of log(sigma/alpha), above 0.
    """

    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise InputError(f"std of the log-normal law must be positive and finite; got {self.std}")

    def __call__(self, process: Process, count: int, draws: Draws) -> Tensor:
        ends = [float(process.log_snr(end)) for end in process.time_range]
        log_snr = -2 * (self.mean + self.std * normal(draws, count))
        return process.time_of_log_snr(log_snr.clamp(min(ends), max(ends)))


@TIME_LAWS.register("logit-normal")
@dataclass(frozen=True)
class LogitNormalTimes(TimeLaw):
    """The fraction of the scheduler's spacing is the logistic of a normal number, arXiv:2403.03206 section 3.1.

    Args:
        mean: of the normal number; above 0 leans to noise.
        std: of it, above 0.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise InputError(f"std of the logit-normal law must be positive and finite; got {self.std}")

    def __call__(self, process: Process, count: int, draws: Draws) -> Tensor:
        return process.from_uniform((self.mean + self.std * normal(draws, count)).sigmoid())


@dataclass(frozen=True)
class Choice:
    """One of several numbers, such as guidance scales.

    Args:
        values: at least one.
        weights: how often each is drawn, relative to the others; None for equally often.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.values:
            raise InputError("a choice needs at least one value; got none")
        check_weights(self.weights, len(self.values))

    def __call__(self, count: int, draws: Draws) -> Tensor:
        """``count`` of the values, float64 (count,)."""
        return torch.tensor(self.values, dtype=torch.float64)[indices(self.weights, len(self.values), count, draws)]


@dataclass(frozen=True)
class Range:
    """A number even in a range, such as a guidance scale."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not -math.inf < self.low <= self.high < math.inf:
            raise InputError(f"low must be at most high, both finite; got {self.low:g} and {self.high:g}")

    def __call__(self, count: int, draws: Draws) -> Tensor:
        """``count`` numbers in [low, high), float64 (count,)."""
        return self.low + (self.high - self.low) * uniform(draws, count)


@TIME_LAWS.register("listed")
@dataclass(frozen=True)
class ListedTimes(TimeLaw):
    """One of listed times, such as those at which the student is deployed."""

    choice: Choice

    def __call__(self, process: Process, count: int, draws: Draws) -> Tensor:
        times = self.choice(count, draws)
        process.alpha(times)
        return times


def check_weights(weights: tuple[float, ...] | None, count: int) -> None:
    """Refuses weights that are not ``count``, negative, or all zero."""
    if weights is None:
        return
    if len(weights) != count:
        raise InputError(f"{count} values need as many weights; got {len(weights)}")
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise InputError(f"weights must be 0 or more with a positive, finite sum; got {weights}")


def indices(weights: tuple[float, ...] | None, length: int, count: int, draws: Draws) -> Tensor:
    """``count`` indices below ``length``, by the inverse of their distribution."""
    each = torch.ones(length, dtype=torch.float64) if weights is None else torch.tensor(weights, dtype=torch.float64)
    ends = each.cumsum(0)
    index = torch.searchsorted(ends / ends[-1], uniform(draws, count), right=True)
    return index.clamp(max=int(each.nonzero()[-1]))
