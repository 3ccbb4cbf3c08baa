"""Explicit grids on EDM schedulers (arXiv:2206.00364): the listed times are what the network is told of sigma."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .errors import InputError
from .explicit_base import EXPLICIT, GridAdapter
from .process import Process


@EXPLICIT.register("CosineDPMSolverMultistepScheduler")
@EXPLICIT.register("EDMDPMSolverMultistepScheduler")
@EXPLICIT.register("EDMEulerScheduler")
class EDMGrid(GridAdapter):
    """Times are log(sigma)/4, or 2/pi arctan(sigma) for the cosine scheduler; they may be negative.

    With ``final_sigmas_type='sigma_min'`` the last step lands at ``sigma_min`` of the config.
    """

    def check_range(self, timesteps: tuple[float, ...]) -> None:
        check_edm_range(timesteps, self.process)

    def set_timesteps(self, base: Callable[..., None], device: Any) -> None:
        scheduler = self.scheduler
        base(len(self.timesteps), device=device)
        sigmas = self.process.sigma(self.timesteps).float()
        scheduler.sigmas = torch.cat([sigmas, scheduler.sigmas[-1:].clamp(max=float(sigmas[-1]))])
        scheduler.timesteps = self.timesteps.float().to(device)


def check_edm_range(timesteps: tuple[float, ...], process: Process) -> None:
    """Raises ``InputError`` for the time of a sigma beyond the scheduler's ``sigma_min`` and ``sigma_max``."""
    rounding = 1e-5  # a time in float32 may lie beyond the end that it stands for
    low, high = process.time_range
    for time in (timesteps[0], timesteps[-1]):
        if not low - rounding <= time <= high + rounding:
            raise InputError(
                f"timestep {time:g} is out of range; the times of this scheduler's sigma_min and sigma_max are "
                f"{low:.4g} and {high:.4g}"
            )
