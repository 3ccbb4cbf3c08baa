"""Grid rules over noise levels: they place times where the noise, not the time, is spaced by a rule."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from typing import ClassVar, Literal

import numpy as np
import scipy.stats
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers import AysSchedules
from pydantic import Field

from .errors import InputError
from .process import Process
from .rules import RULES, Floats, Ranged, Rule, cleanest
from .schedules import FlowSchedule

CAP = math.log(2.0**-24 / (1 - 2.0**-24))
"The log-SNR that stands for -infinity: alpha^2 = 2^-24, as diffusers ends a table of zero terminal SNR."


def log_snr(process: Process, time: float) -> float:
    """The log-SNR of a time, `CAP` at least."""
    return max(CAP, float(process.log_snr(time)))


def times_of_log_snr(process: Process, values: Floats) -> Floats:
    """Times of log-SNRs; a value that the process does not reach gives its nearest end."""
    return np.asarray(process.time_of_log_snr(torch.from_numpy(values)).numpy())


class LevelRule(Ranged):
    """A rule between the noise levels of two times.

    The level is sigma/alpha, diffusers' sigma. On flow matching it is sigma itself, from 1 down, as there too. At zero
    terminal SNR the level is that of alpha^2 = 2^-24; the first time of the grid is then still the one of zero SNR.
    """

    def _times(self, process: Process, steps: int) -> Floats:
        first, last = self.between(process)
        count = self.count(steps)
        fractions = np.linspace(0, 1, count)[:steps]
        values = self._between(self._level(process, first), self._level(process, last), fractions)
        times = self._times_of(process, values)
        times[0] = first
        if count == steps > 1:
            times[-1] = last
        return times

    @abstractmethod
    def _between(self, high: float, low: float, fractions: Floats) -> Floats:
        """Levels at fractions of the grid, 0 for ``high`` and 1 for ``low``."""

    def _level(self, process: Process, time: float) -> float:
        if isinstance(process.schedule, FlowSchedule):
            return float(process.sigma(time))
        return math.exp(-log_snr(process, time) / 2)

    def _times_of(self, process: Process, levels: Floats) -> Floats:
        if isinstance(process.schedule, FlowSchedule):
            return np.asarray(process.schedule.time_of_sigma(torch.from_numpy(levels)).numpy())
        return times_of_log_snr(process, -2 * np.log(levels))


@RULES.register("karras")
class Karras(LevelRule):
    """Even in the rho-th root of the noise level (arXiv:2206.00364, equation 5)."""

    rho: float = Field(default=7.0, gt=0, description="Above 1, larger is denser at the clean end.")

    def _between(self, high: float, low: float, fractions: Floats) -> Floats:
        start, end = high ** (1 / self.rho), low ** (1 / self.rho)
        return np.asarray((start + fractions * (end - start)) ** self.rho)


@RULES.register("exponential")
class Exponential(LevelRule):
    """Even in the logarithm of the noise level, both ends in it (diffusers' ``use_exponential_sigmas``)."""

    def _between(self, high: float, low: float, fractions: Floats) -> Floats:
        return np.exp(math.log(high) + fractions * (math.log(low) - math.log(high)))


@RULES.register("beta")
class Beta(LevelRule):
    """Noise levels at quantiles of a beta distribution (arXiv:2407.12173, on sigmas as diffusers has it)."""

    alpha: float = Field(default=0.6, gt=0, description="Below 1, denser at the clean end.")
    beta: float = Field(default=0.6, gt=0, description="Below 1, denser at the noisy end.")

    def _between(self, high: float, low: float, fractions: Floats) -> Floats:
        return np.asarray(low + scipy.stats.beta.ppf(1 - fractions, self.alpha, self.beta) * (high - low))


@RULES.register("logsnr-uniform")
class LogSnrUniform(LevelRule):
    """Even in log-SNR, ``steps`` equal steps that end at the cleanest time (arXiv:2206.00927, section 3.4).

    On a variance-preserving or EDM process `Exponential` with ``endpoint`` false is the same.
    """

    ends: ClassVar[bool] = False

    def _between(self, high: float, low: float, fractions: Floats) -> Floats:
        return np.asarray(high + fractions * (low - high))

    def _level(self, process: Process, time: float) -> float:
        return log_snr(process, time)

    def _times_of(self, process: Process, levels: Floats) -> Floats:
        return times_of_log_snr(process, levels)


@RULES.register("align-your-steps")
class AlignYourSteps(Rule):
    """The published noise levels of ten steps, log-linearly interpolated for other counts (arXiv:2404.14507).

    The eleventh level, where the tenth step ends, is the cleanest one of the process, as in the paper's own tables. The
    first time is the process's noisiest, where sampling starts. On Stable Diffusion's betas ten steps are diffusers'
    timesteps; times of other processes are those of the same SNR.
    """

    rounds: ClassVar[bool] = True
    table: Literal["sd1", "sdxl", "svd"] = Field(default="sd1", description="The model that it was optimised for.")

    def _times(self, process: Process, steps: int) -> Floats:
        clean = math.exp(-log_snr(process, cleanest(process)) / 2)
        noisiest = math.exp(-log_snr(process, self.noisiest(process)) / 2)
        levels = np.array([*published_levels(self.table), clean])
        if not noisiest > levels[1] or not levels[-2] > clean:
            raise InputError(
                f"the table {self.table!r} has noise levels {levels[1]:.3g} to {levels[-2]:.3g}, and this process has "
                f"{noisiest:.3g} to {clean:.3g}; choose another table or rule"
            )
        places = np.linspace(0, len(levels) - 1, steps + 1)[:-1]
        chosen = np.exp(np.interp(places, np.arange(len(levels)), np.log(levels)))
        times = times_of_log_snr(process, -2 * np.log(chosen))
        times[0] = self.noisiest(process)
        return times


@functools.cache
def published_levels(table: str) -> tuple[float, ...]:
    """The ten noise levels sigma/alpha of a table of `AlignYourSteps`, noisiest first.

    Where diffusers has timesteps, the levels are those of Stable Diffusion's betas there; its sigmas are the same,
    rounded.
    """
    timesteps = {"sd1": "StableDiffusionTimesteps", "sdxl": "StableDiffusionXLTimesteps"}
    if table not in timesteps:
        return tuple(AysSchedules["StableDiffusionVideoSigmas"][:-1])
    betas = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    times = torch.tensor(AysSchedules[timesteps[table]], dtype=torch.float64)
    return tuple((-Process.from_scheduler(betas).log_snr(times) / 2).exp().tolist())
