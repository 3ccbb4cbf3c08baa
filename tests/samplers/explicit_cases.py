"""What the tests of explicit grids share: schedulers, drivers, and the exact network of Gaussian data."""

import inspect

import diffusers
import numpy as np
import torch
from diffusers.utils import is_torchsde_available

from fewstep.samplers import Process
from fewstep.samplers.explicit import EXPLICIT, grid_adapter
from fewstep.samplers.wrapped import wrap_scheduler

NEED_TORCHSDE = ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")
INSTALLED = [name for name in EXPLICIT.names() if is_torchsde_available() or name not in NEED_TORCHSDE]
VARIANCE = 0.3**2


def make(name, **options):
    return getattr(diffusers, name)(**options)


def accepted(function, **options):
    known = inspect.signature(function).parameters
    return {key: value for key, value in options.items() if key in known}


def explicit(scheduler, grid):
    """The scheduler, wrapped, with its grid set, told that x will be in its own state space."""
    wrap_scheduler(scheduler, grid_adapter(scheduler, tuple(grid)))
    scheduler.set_timesteps(len(grid))
    getattr(scheduler, "init_noise_sigma", None)
    return scheduler


def trajectory(scheduler, network):
    """All states from unit noise, as a pipeline drives a scheduler."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    states, options = [], accepted(scheduler.step, generator=generator)
    for t in scheduler.timesteps:
        fed = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(fed, float(t)), t, x, return_dict=False, **options)[0]
        states.append(x)
    return torch.stack(states)


def wavy(x, t):
    """A plain network that hears the time."""
    return torch.sin(2 * x + 0.01 * t) - 0.2 * np.cos(t)


def gaussian_output(process, x, t):
    """The exact network output for data N(0, VARIANCE)."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    total = alpha**2 * VARIANCE + sigma**2
    return process.target(alpha * VARIANCE / total * x, sigma / total * x, t)


def rough_grid(process, first, last, steps):
    """From ``first`` to ``last`` in steps of log-SNR that are alternately short and twice as long."""
    ends = [float(process.log_snr(time)) for time in (first, last)]
    place = np.concatenate([[0], np.cumsum(([1.0, 2.0] * steps)[:steps])])
    return [float(process.time_of_log_snr(at)) for at in np.interp(place / place[-1], [0, 1], ends)]


def solve(scheduler, grid, x, stop):
    """x (float64, the network's) at ``grid[0]`` carried on; the last ``stop`` calls of the scheduler are left out."""
    process = Process.from_scheduler(scheduler)
    x = x * process.scheduler_state_scale(grid[0])
    generator = torch.Generator().manual_seed(1)
    options = accepted(scheduler.step, generator=generator)
    for t in scheduler.timesteps[: len(scheduler.timesteps) - stop]:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)  # LMS warns without
        scale = process.scheduler_state_scale(float(t))
        x = scheduler.step(gaussian_output(process, x / scale, float(t)), t, x, return_dict=False, **options)[0]
    return x


def wide_start(process, time, shape):
    """Draws of x at ``time`` for the Gaussian data, float64."""
    std = (process.alpha(time) ** 2 * VARIANCE + process.sigma(time) ** 2) ** 0.5
    return std * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
