"""Explicit grids on diffusers' schedulers: the coefficients between the given timesteps are the true ones.

Schedulers come in families, and each has one way. Those that step between sigmas get the sigmas of the listed
times; DDIM, which steps a fixed distance in its table of alphas, gets a table that has just the listed times.
Whole timesteps use the scheduler's own table entries; fractional ones the `Process` between them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .process import Process
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
            if scheduler.config.get(option):
                raise InputError(
                    f"{option}=True makes a grid of its own, against the explicit grid; set it to false in the "
                    "solver's config or remove the grid part"
                )
        self.scheduler = scheduler
        self.process = Process.from_scheduler(scheduler)
        self.check_range(timesteps)
        self.timesteps = torch.tensor(timesteps, dtype=torch.float64)
        whole = bool((self.timesteps == self.timesteps.round()).all())
        self.reported = self.timesteps.long() if whole else self.timesteps.float()

    def check_range(self, timesteps: tuple[float, ...]) -> None:
        """Raises ``InputError`` for a time that the network was not trained on."""
        last = self.scheduler.config.num_train_timesteps - 1
        if timesteps[0] > last:
            raise InputError(f"timestep {timesteps[0]:g} is out of range; this scheduler was trained on 0 to {last}")

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


@EXPLICIT.register("EulerDiscreteScheduler")
class EulerGrid(GridAdapter):
    """Euler takes timesteps itself, fractional ones too, and interpolates sigma linearly."""

    def set_timesteps(self, base: Callable[..., None], device: Any) -> None:
        base(timesteps=self.timesteps.tolist(), device=device)


@EXPLICIT.register("DPMSolverMultistepScheduler")
@EXPLICIT.register("UniPCMultistepScheduler")
class SigmaGrid(GridAdapter):
    """Schedulers whose coefficients come from ``sigmas`` alone: they get the sigmas of the listed times."""

    def check_range(self, timesteps: tuple[float, ...]) -> None:
        if self.scheduler.config.get("use_flow_sigmas"):
            check_flow_range(timesteps, self.scheduler.config.num_train_timesteps)
        else:
            super().check_range(timesteps)
        if getattr(self.scheduler, "solver_p", None) is not None:
            raise InputError("UniPC with a separate solver_p cannot run an explicit grid; leave solver_p out")

    def set_timesteps(self, base: Callable[..., None], device: Any) -> None:
        scheduler, flow = self.scheduler, self.scheduler.config.get("use_flow_sigmas")
        dynamic = {"mu": 1.0} if flow and scheduler.config.get("use_dynamic_shifting") else {}
        base(len(self.timesteps), device=device, **dynamic)
        sigmas = self._flow_sigmas() if flow else self._table_sigmas()
        last = scheduler.sigmas[-1] if scheduler.config.final_sigmas_type == "zero" or not flow else sigmas[-1]
        scheduler.sigmas = torch.cat([sigmas, last.reshape(1)])
        scheduler.timesteps = self.reported.to(device)

    def _table_sigmas(self) -> Tensor:
        """sigma/alpha at the listed times, float32 as the scheduler keeps it."""
        alphas: Tensor = self.scheduler.alphas_cumprod.cpu()
        low = self.timesteps.floor().long()
        between = (self.process.sigma(self.timesteps) / self.process.alpha(self.timesteps)).float()
        sigmas: Tensor = torch.where(self.timesteps == low, ((1 - alphas) / alphas).sqrt()[low], between)
        return sigmas

    def _flow_sigmas(self) -> Tensor:
        """sigma at the listed times; 1 is kept off by 1e-6, where the log-SNR is infinite."""
        sigmas: Tensor = self.timesteps / self.scheduler.config.num_train_timesteps
        return sigmas.clamp(max=1 - 1e-6).float()


@EXPLICIT.register("FlowMatchEulerDiscreteScheduler")
class FlowGrid(GridAdapter):
    """Flow matching: sigma is the timestep over the number of training timesteps, with no shift on top."""

    def __init__(self, scheduler: Any, timesteps: tuple[float, ...]) -> None:
        if scheduler.config.get("invert_sigmas"):
            raise InputError("invert_sigmas=True reverses the time axis; an explicit grid does not run on it")
        super().__init__(scheduler, timesteps)

    def check_range(self, timesteps: tuple[float, ...]) -> None:
        check_flow_range(timesteps, self.scheduler.config.num_train_timesteps)

    def set_timesteps(self, base: Callable[..., None], device: Any) -> None:
        scheduler = self.scheduler
        dynamic = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
        base(len(self.timesteps), device=device, **dynamic)
        sigmas = (self.timesteps / scheduler.config.num_train_timesteps).float()
        scheduler.sigmas = torch.cat([sigmas, torch.zeros(1)]).to(device)
        scheduler.timesteps = self.timesteps.float().to(device)


@EXPLICIT.register("DDIMScheduler")
class TableGrid(GridAdapter):
    """DDIM steps ``num_train_timesteps // num_inference_steps`` entries down its table of alphas.

    While it steps, it sees a table with one entry per listed time, and steps one entry down.
    """

    def __init__(self, scheduler: Any, timesteps: tuple[float, ...]) -> None:
        super().__init__(scheduler, timesteps)
        ascending = self.timesteps.flip(0)
        low = ascending.floor().long()
        between = self.process.alpha(ascending).pow(2).float()
        self.table = torch.where(ascending == low, scheduler.alphas_cumprod.cpu()[low], between)

    def set_timesteps(self, base: Callable[..., None], device: Any) -> None:
        base(len(self.timesteps), device=device)
        self.scheduler.timesteps = self.reported.to(device)

    def step(
        self, base: Callable[..., Any], output: Tensor, timestep: Any, sample: Tensor, options: dict[str, Any]
    ) -> Any:
        entry = self._entries(torch.as_tensor(timestep).reshape(1))[0]
        with self._swapped_table(sample.device):
            return base(output, int(entry), sample, **options)

    def add_noise(self, base: Callable[..., Tensor], sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        entries = self._entries(timesteps)
        with self._swapped_table(sample.device):
            return base(sample, noise, entries)

    def _entries(self, timesteps: Tensor) -> Tensor:
        """Table entries (int64) of times of the grid."""
        grid = self.reported.to(torch.float64)
        near = (timesteps.detach().cpu().to(torch.float64)[:, None] - grid).abs()
        if bool((near.min(dim=1).values > 1e-3).any()):
            raise InputError(f"timesteps {timesteps.tolist()} are not on the plan's grid {grid.tolist()}")
        return len(grid) - 1 - near.argmin(dim=1)

    def _swapped_table(self, device: torch.device) -> _Swap:
        steps = self.scheduler.config.num_train_timesteps
        return _Swap(self.scheduler, alphas_cumprod=self.table.to(device), num_inference_steps=steps)


class _Swap:
    """Attributes of an object, replaced for the length of a block."""

    def __init__(self, target: Any, **values: Any) -> None:
        self.target, self.values = target, values

    def __enter__(self) -> None:
        self.kept = {name: getattr(self.target, name) for name in self.values}
        for name, value in self.values.items():
            setattr(self.target, name, value)

    def __exit__(self, *_: object) -> None:
        for name, value in self.kept.items():
            setattr(self.target, name, value)


def check_flow_range(timesteps: tuple[float, ...], last: int) -> None:
    """Raises ``InputError`` for a flow time that is not in (0, ``last``]."""
    if timesteps[0] > last or timesteps[-1] <= 0:
        wrong = timesteps[0] if timesteps[0] > last else timesteps[-1]
        raise InputError(f"timestep {wrong:g} is out of range; flow-matching times are above 0 and at most {last}")


def grid_adapter(scheduler: Any, timesteps: tuple[float, ...]) -> GridAdapter:
    """The adapter that runs ``scheduler`` on an explicit grid.

    Raises:
        InputError: when this scheduler has none, or the grid does not fit it.
    """
    name = type(scheduler).__name__
    if name not in EXPLICIT:
        raise InputError(
            f"{name} does not run an explicit grid; use one of {', '.join(EXPLICIT.names())}, or a 'spacing' grid"
        )
    return EXPLICIT[name](scheduler, timesteps)
