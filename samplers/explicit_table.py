"""Explicit grids on schedulers that look alphas up in a table by timestep."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .explicit_base import EXPLICIT, GridAdapter, Swap, table_values


class EntryGrid(GridAdapter):
    """While it steps, the scheduler sees a table with one entry per listed time, cleanest first."""

    def __init__(self, scheduler: Any, timesteps: tuple[float, ...]) -> None:
        super().__init__(scheduler, timesteps)
        ascending = self.timesteps.flip(0)
        self.table = table_values(scheduler.alphas_cumprod.cpu(), ascending, self.process.alpha(ascending).pow(2))

    def set_timesteps(self, base: Callable[..., None], device: Any) -> None:
        base(len(self.timesteps), device=device)
        self.scheduler.timesteps = self.reported.to(device)

    def step(
        self, base: Callable[..., Any], output: Tensor, timestep: Any, sample: Tensor, options: dict[str, Any]
    ) -> Any:
        entry = self.entries(torch.as_tensor(timestep).reshape(1))[0]
        with Swap(self.scheduler, alphas_cumprod=self.table.to(sample.device), **self.swapped()):
            return base(output, int(entry), sample, **options)

    def add_noise(self, base: Callable[..., Tensor], sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        entries = self.entries(timesteps)
        with Swap(self.scheduler, alphas_cumprod=self.table.to(sample.device)):
            return base(sample, noise, entries)

    def entries(self, timesteps: Tensor) -> Tensor:
        """Table entries (int64) of times of the grid."""
        grid = self.reported.to(torch.float64)
        near = (timesteps.detach().cpu().to(torch.float64)[:, None] - grid).abs()
        if bool((near.min(dim=1).values > 1e-3).any()):
            raise InputError(f"timesteps {timesteps.tolist()} are not on the plan's grid {grid.tolist()}")
        return len(grid) - 1 - near.argmin(dim=1)

    @abstractmethod
    def swapped(self) -> dict[str, Any]:
        """Further attributes of the scheduler while it steps: what makes it step one entry down."""


@EXPLICIT.register("CogVideoXDDIMScheduler")
@EXPLICIT.register("DDIMParallelScheduler")
@EXPLICIT.register("DDIMScheduler")
class StrideGrid(EntryGrid):
    """DDIM (arXiv:2010.02502) steps ``num_train_timesteps // num_inference_steps`` entries down, here one.

    With ``timestep_spacing='linspace'`` that stride is not the distance to the next timestep: diffusers' own run then
    lands at one time and calls the network with another. As a list, those timesteps land where the next call is.
    """

    def swapped(self) -> dict[str, Any]:
        return {"num_inference_steps": self.scheduler.config.num_train_timesteps}


@EXPLICIT.register("DDPMParallelScheduler")
@EXPLICIT.register("DDPMScheduler")
class PosteriorGrid(EntryGrid):
    """DDPM (arXiv:2006.11239): the mean and variance of q(x_s | x_t, x0) for the next listed s.

    The last step adds no noise (algorithm 2). diffusers asks ``t > 0`` instead, so that its own grids that end above
    0 add noise of standard deviation 1e-10 to the finished sample, and with ``variance_type='fixed_large'`` of
    sqrt(1 - alpha^2), which is visible.
    """

    def swapped(self) -> dict[str, Any]:
        return {"timesteps": torch.arange(len(self.timesteps)).flip(0), "custom_timesteps": True}


class _AlphasByTime:
    """Stands for a table of squared alphas: its index is a time, whole or not."""

    def __init__(self, adapter: LookupGrid, device: torch.device) -> None:
        self.adapter, self.device = adapter, device

    def __getitem__(self, time: Any) -> Tensor:
        return self.adapter.squared_alpha(time).to(self.device)


@EXPLICIT.register("LCMScheduler")
@EXPLICIT.register("TCDScheduler")
class LookupGrid(GridAdapter):
    """Consistency samplers (arXiv:2310.04378, arXiv:2402.19159), which follow their list but know whole times only.

    They limit the number of steps to that of the distillation; a list may be longer. TCD's intermediate time,
    (1 - eta) times the next one, is a whole number, as diffusers has it.
    """

    def __init__(self, scheduler: Any, timesteps: tuple[float, ...]) -> None:
        super().__init__(scheduler, timesteps)
        self.table: Tensor = scheduler.alphas_cumprod.cpu()

    def set_timesteps(self, base: Callable[..., None], device: Any) -> None:
        base(1, device=device)
        self.scheduler.num_inference_steps = len(self.timesteps)
        self.scheduler.timesteps = self.reported.to(device)

    def step(
        self, base: Callable[..., Any], output: Tensor, timestep: Any, sample: Tensor, options: dict[str, Any]
    ) -> Any:
        with Swap(self.scheduler, alphas_cumprod=_AlphasByTime(self, sample.device)):
            return base(output, timestep, sample, **options)

    def add_noise(self, base: Callable[..., Tensor], sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.process.add_noise(sample, noise, timesteps)

    def squared_alpha(self, time: Any) -> Tensor:
        """alpha^2 at a time or times of the table."""
        times = torch.as_tensor(time).detach().cpu().to(torch.float64)
        return table_values(self.table, times, self.process.alpha(times).pow(2))
