"""Explicit grids on flow-matching schedulers: sigma is the timestep over the number of training timesteps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .errors import InputError
from .explicit_base import EXPLICIT, GridAdapter
from .recognise import own_option


@EXPLICIT.register("FlowMapEulerDiscreteScheduler")
@EXPLICIT.register("FlowMatchEulerDiscreteScheduler")
@EXPLICIT.register("FlowMatchLCMScheduler")
@EXPLICIT.register("LTXEulerAncestralRFScheduler")
class FlowGrid(GridAdapter):
    """Flow matching, one evaluation per listed time, with no shift on top of the list."""

    def __init__(self, scheduler: Any, timesteps: tuple[float, ...]) -> None:
        if own_option(scheduler, "invert_sigmas"):
            raise InputError("invert_sigmas=True reverses the time axis; an explicit grid does not run on it")
        super().__init__(scheduler, timesteps)

    def check_range(self, timesteps: tuple[float, ...]) -> None:
        check_flow_range(timesteps, self.scheduler.config.num_train_timesteps)

    def set_timesteps(self, base: Callable[..., None], device: Any) -> None:
        scheduler = self.scheduler
        dynamic = {"mu": 1.0} if own_option(scheduler, "use_dynamic_shifting") else {}
        base(len(self.timesteps), device=device, **dynamic)
        dtype = scheduler.sigmas.dtype
        sigmas = self.timesteps / scheduler.config.num_train_timesteps
        scheduler.sigmas = torch.cat([sigmas, torch.zeros(1)]).to(device, dtype)
        scheduler.timesteps = self.timesteps.to(device, dtype)


@EXPLICIT.register("FlowMatchHeunDiscreteScheduler")
class FlowHeunGrid(FlowGrid):
    """Heun on the flow evaluates twice per step: ``timesteps`` has all but the first listed twice."""

    def set_timesteps(self, base: Callable[..., None], device: Any) -> None:
        super().set_timesteps(base, device)
        scheduler = self.scheduler
        first, rest, zero = scheduler.sigmas[:1], scheduler.sigmas[1:-1], scheduler.sigmas[-1:]
        scheduler.sigmas = torch.cat([first, rest.repeat_interleave(2), zero])
        scheduler.timesteps = torch.cat([scheduler.timesteps[:1], scheduler.timesteps[1:].repeat_interleave(2)])


def check_flow_range(timesteps: tuple[float, ...], last: int) -> None:
    """Raises ``InputError`` for a flow time that is not in (0, ``last``]."""
    if timesteps[0] > last or timesteps[-1] <= 0:
        wrong = timesteps[0] if timesteps[0] > last else timesteps[-1]
        raise InputError(f"timestep {wrong:g} is out of range; flow-matching times are above 0 and at most {last}")
