"""Explicit grids on the pseudo linear multi-step schedulers, PNDM and IPNDM.

Both average past noise predictions with the weights of Adams and Bashforth for even steps, 55/24 and so on. Between
rough points those weights are wrong and the order falls to one; here they are those of the points given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from .errors import InputError
from .explicit_base import EXPLICIT, GridAdapter, as_told

ORDER = 4


def adams_weights(points: list[float], landing: float) -> list[float]:
    """Weights w so that the sum of w f(point) is the mean of f from ``points[0]`` to ``landing``.

    Exact for polynomials of degree below ``len(points)``: the variable-step Adams-Bashforth formula (Hairer,
    Norsett, Wanner, Solving Ordinary Differential Equations I, section III.5).

    Args:
        points: 1 to 4 distinct places, the newest first.
        landing: where the step ends, not ``points[0]``.
    """
    place = (torch.tensor(points, dtype=torch.float64) - points[0]) / (landing - points[0])
    power = torch.arange(len(points), dtype=torch.float64)
    weights: list[float] = torch.linalg.solve(place ** power[:, None], 1 / (power + 1)).tolist()
    return weights


def extrapolated(history: list[tuple[float, Tensor]], landing: float) -> Tensor:
    """Mean of the values in ``history`` (place, value; oldest first) over the step from the newest to ``landing``."""
    newest = history[::-1][:ORDER]
    weights = adams_weights([place for place, _ in newest], landing)
    total = weights[0] * newest[0][1]
    for weight, (_, value) in zip(weights[1:], newest[1:], strict=True):
        total = total + weight * value
    return total


@EXPLICIT.register("PNDMScheduler")
class PNDMGrid(GridAdapter):
    """PNDM (arXiv:2202.09778): noise predictions averaged over time, then the DDIM transfer, equation 11.

    ``timesteps`` has the second listed time twice (S-PNDM's start, ``skip_prk_steps=True``), or for each of the first
    three steps both ends and twice the middle in time (F-PNDM's Runge-Kutta start, equation 13; any number of listed
    times will do, where diffusers needs four).

    On the grid that the scheduler would make itself it runs untouched, bit for bit. Elsewhere the steps are taken
    here, because diffusers' would have the wrong weights, and would average v-predictions of different times as if
    they were noise.
    """

    def set_timesteps(self, base: Callable[..., None], device: Any) -> None:
        scheduler, listed = self.scheduler, self.timesteps.tolist()
        runge_kutta = not scheduler.config.skip_prk_steps
        base(max(len(listed), ORDER) if runge_kutta else len(listed), device=device)
        self.untouched = scheduler._timesteps[::-1].tolist() == listed
        if self.untouched:
            return
        scheduler.num_inference_steps = len(listed)
        self.starts = min(3, len(listed) - 1) if runge_kutta else 0
        if runge_kutta:
            steps = [[t, (t + s) / 2, (t + s) / 2, s] for t, s in pairwise(listed[: self.starts + 1])]
            sequence = [time for step in steps for time in step] + listed[self.starts :]
        else:
            sequence = listed[:2] + listed[1:]
        scheduler.timesteps = as_told(torch.tensor(sequence, dtype=torch.float64)).to(device)
        self.history: list[tuple[float, Tensor]] = []
        self.count = 0

    def step(
        self, base: Callable[..., Any], output: Tensor, timestep: Any, sample: Tensor, options: dict[str, Any]
    ) -> Any:
        if self.untouched:
            return base(output, timestep, sample, **options)
        time = float(timestep)
        eps = self.process.to_eps(output, sample, time)
        if self.count == 0:
            self._begin(time)
        if self.count < 4 * self.starts:
            landed = self._runge_kutta(eps, sample)
        elif self.count == 1 and self.repeats:
            landed = self._transfer(self.origin, (self.history[-1][1] + eps) / 2, self.history[-1][0], time)
        else:
            landed = self._multistep(eps, sample, time)
        self.count += 1
        return SchedulerOutput(prev_sample=landed) if options.get("return_dict", True) else (landed,)

    def add_noise(self, base: Callable[..., Tensor], sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noises to any time; diffusers' PNDM indexes a table and so knows whole timesteps only."""
        return base(sample, noise, timesteps) if self.untouched else self.process.add_noise(sample, noise, timesteps)

    def _begin(self, time: float) -> None:
        """Notes whether the call starts at the first listed time; image-to-image starts inside and has no start-up."""
        first = abs(time - float(self.timesteps[0])) < 1e-3
        if self.starts and not first:
            raise InputError(
                f"PNDM with Runge-Kutta steps cannot start inside its grid, at timestep {time:g}; set skip_prk_steps "
                "to true in the solver's config"
            )
        self.repeats = first and not self.starts

    def _runge_kutta(self, eps: Tensor, sample: Tensor) -> Tensor:
        """The classic Runge-Kutta formula on noise predictions."""
        stage = self.count % 4
        start, end = self.timesteps[self.count // 4 : self.count // 4 + 2].tolist()
        if stage == 0:
            self.origin, self.mean = sample, torch.zeros_like(eps)
            self.history.append((start, eps))
        self.mean = self.mean + (1 / 6, 1 / 3, 1 / 3, 1 / 6)[stage] * eps
        landing = (start + end) / 2 if stage < 2 else end
        return self._transfer(self.origin, self.mean if stage == 3 else eps, start, landing)

    def _multistep(self, eps: Tensor, sample: Tensor, time: float) -> Tensor:
        landing = self._after(time)
        if landing == time:  # the last listed time is 0, where the scheduler stops
            return sample
        self.origin = sample
        self.history.append((time, eps))
        return self._transfer(sample, extrapolated(self.history, landing), time, landing)

    def _transfer(self, sample: Tensor, eps: Tensor, time: float, landing: float) -> Tensor:
        return self.process.jump(sample, time, landing, eps=eps)

    def _after(self, time: float) -> float:
        """The next listed time, or at the end that of the alpha at which the scheduler stops."""
        listed = self.timesteps.tolist()
        index = min(range(len(listed)), key=lambda i: abs(listed[i] - time))
        if index + 1 < len(listed):
            return float(listed[index + 1])
        return self.process.clean_time if self.scheduler.config.set_alpha_to_one else 0.0


@EXPLICIT.register("IPNDMScheduler")
class IPNDMGrid(GridAdapter):
    """IPNDM, in k-diffusion's quarter circle: times above 0 and at most 1, alpha = cos(pi t/2), sigma = sin(pi t/2).

    Its own grids are even in 2/pi arcsin(sqrt(sigma)); its weights are those of points in that variable. Its first
    step from time 1 lands as if the clean sample were 0, as diffusers has it.
    """

    def check_range(self, timesteps: tuple[float, ...]) -> None:
        if self.scheduler.config.trained_betas is not None:
            raise InputError("trained_betas fixes IPNDM's grid; leave trained_betas out or remove the grid part")
        for time in (timesteps[0], timesteps[-1]):
            if not 0 < time <= 1:
                raise InputError(f"timestep {time:g} is out of range; IPNDM's times are above 0 and at most 1")

    def set_timesteps(self, base: Callable[..., None], device: Any) -> None:
        scheduler = self.scheduler
        base(len(self.timesteps), device=device)
        ends = torch.cat([self.timesteps, torch.zeros(1, dtype=torch.float64)])
        scheduler.betas = self.process.sigma(ends).float()
        scheduler.alphas = self.process.alpha(ends).float()
        scheduler.timesteps = self.timesteps.float().to(device)
        self.places: list[float] = (self.process.sigma(ends).sqrt().asin() * (2 / math.pi)).tolist()
        self.history: list[tuple[float, Tensor]] = []

    def step(
        self, base: Callable[..., Any], output: Tensor, timestep: Any, sample: Tensor, options: dict[str, Any]
    ) -> Any:
        scheduler = self.scheduler
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        here = scheduler.step_index
        self.history.append((self.places[here], sample * scheduler.betas[here] + output * scheduler.alphas[here]))
        mean = extrapolated(self.history, self.places[here + 1])
        landed = scheduler._get_prev_sample(sample, here, here + 1, mean)
        scheduler._step_index += 1
        return SchedulerOutput(prev_sample=landed) if options.get("return_dict", True) else (landed,)
