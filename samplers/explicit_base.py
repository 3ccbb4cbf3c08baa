"""What every way of running an explicit grid shares, and the registry of schedulers that run one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .process import Process
from .recognise import own_option
from .registry import Registry

WARPS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


class GridAdapter(ABC):
    """Runs one scheduler on an explicit grid.

    Args:
        scheduler: the scheduler, ours to change; its class methods are those of diffusers.
        timesteps: strictly decreasing times in the network's units.
    """

    def __init__(self, scheduler: Any, timesteps: tuple[float, ...]) -> None:
        for option in WARPS:
            if own_option(scheduler, option):
                raise InputError(
                    f"{option}=True makes a grid of its own, against the explicit grid; set it to false in the "
                    "solver's config or remove the grid part"
                )
        self.scheduler = scheduler
        self.process = Process.from_scheduler(scheduler)
        self.check_range(timesteps)
        self.timesteps = torch.tensor(timesteps, dtype=torch.float64)
        self.reported = as_told(self.timesteps)

    def check_range(self, timesteps: tuple[float, ...]) -> None:
        """Raises ``InputError`` for a time that the network was not trained on."""
        last = self.scheduler.config.num_train_timesteps - 1
        for time in (timesteps[0], timesteps[-1]):
            if not 0 <= time <= last:
                raise InputError(f"timestep {time:g} is out of range; this scheduler was trained on 0 to {last}")

    @abstractmethod
    def set_timesteps(self, base: Callable[..., None], device: Any) -> None:
        """Puts the grid in place of the scheduler's own. ``base`` is the scheduler's ``set_timesteps``."""

    def step(
        self, base: Callable[..., Any], output: Tensor, timestep: Any, sample: Tensor, options: dict[str, Any]
    ) -> Any:
        """One step from ``timestep`` to the next of the grid. ``base`` is the scheduler's ``step``."""
        return base(output, timestep, sample, **options)

    def add_noise(self, base: Callable[..., Tensor], sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noises clean samples to times of the grid. ``base`` is the scheduler's ``add_noise``."""
        return base(sample, noise, timesteps)


EXPLICIT: Registry[type[GridAdapter]] = Registry("scheduler that runs an explicit grid")


def as_told(timesteps: Tensor) -> Tensor:
    """Times (float64) as the network is told them: int64 where all are whole, else float32."""
    whole = bool((timesteps == timesteps.round()).all())
    return timesteps.long() if whole else timesteps.float()


def table_values(table: Tensor, timesteps: Tensor, between: Tensor) -> Tensor:
    """``table``'s own entries at whole ``timesteps`` (float64, inside the table), ``between`` at fractional ones."""
    low = timesteps.floor().long()
    return torch.where(timesteps == low, table[low], between.to(table.dtype))


class Swap:
    """Attributes of an object, replaced for the length of a block."""

    def __init__(self, target: Any, **values: Any) -> None:
        self.target, self.values = target, values

    def __enter__(self) -> None:
        self.kept = {name: vars(self.target)[name] for name in self.values if name in vars(self.target)}
        for name, value in self.values.items():
            setattr(self.target, name, value)

    def __exit__(self, *_: object) -> None:
        for name in self.values:
            if name in self.kept:
                setattr(self.target, name, self.kept[name])
            else:
                delattr(self.target, name)
