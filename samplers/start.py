"""The start: what sampling starts from, if not the pipeline's own noise."""

from __future__ import annotations

from typing import Any

import torch

from .part import Part
from .process import Process
from .registry import Registry

STARTS: Registry[type[Part]] = Registry("start type")


def unit_noise(scheduler: Any, process: Process, time: float, device: torch.device) -> float:
    """What the pipeline's unit noise was multiplied with to stand for x_M = alpha_M x0 + sigma_M eps.

    A pipeline that scales its noise by ``init_noise_sigma`` is in the scheduler's state space; another one shows the
    network the noise itself. The attached scheduler tells: for the latter it leaves inputs unscaled.

    Args:
        scheduler: of the running call, before its first step is taken.
        process: its forward process.
        time: M, of the first step.
        device: of the samples.
    """
    if not hasattr(scheduler, "scale_model_input") or not hasattr(type(scheduler), "init_noise_sigma"):
        return 1.0
    probe = torch.ones(1, device=device)
    if scheduler.scale_model_input(probe, scheduler.timesteps[0]) is probe:
        return 1 / float(process.input_scale(time))
    return float(scheduler.init_noise_sigma) / float(process.scheduler_state_scale(time))
