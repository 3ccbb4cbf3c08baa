"""What the two teachers share: the noise schedule, the loss, and saving."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler
from torch import Generator, Tensor

Network = Callable[[Tensor, Tensor], Tensor]
"""From noisy samples (B, C, H, W) and timesteps int64 (B,) to the predicted velocity."""


def teacher_scheduler() -> DDIMScheduler:
    """Linear betas of DDPM (arXiv:2006.11239), velocity prediction (arXiv:2202.00512), trailing grid."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def velocity_loss(
    scheduler: DDIMScheduler, network: Network, x0: Tensor, generator: Generator, time_power: float = 1.0
) -> Tensor:
    """Mean squared error of the velocity at times that are stratified over the batch.

    Args:
        scheduler: the teacher's scheduler.
        network: predicts the velocity.
        x0: clean samples, float32 (B, C, H, W).
        generator: the step's generator.
        time_power: times are 1000 u^power of uniform u; above 1 the cleaner ones, which make the texture, come oftener.
    """
    size = len(x0)
    uniform = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    t = (uniform**time_power * scheduler.config.num_train_timesteps).long()
    noise = torch.randn(x0.shape, generator=generator)
    target = scheduler.get_velocity(x0, noise, t)
    error: Tensor = network(scheduler.add_noise(x0, noise, t), t).float() - target
    return error.pow(2).mean()
