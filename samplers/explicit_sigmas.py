"""Explicit grids on schedulers that step between sigmas: they get the sigmas of the listed times.

Two families differ in what they keep. The DPM-Solver family (x itself, whole timesteps) reads its table at whole
timesteps, and the `Process` between them. The k-diffusion family (x/alpha) has fractional timesteps of its own, at
which it interpolates sigma linearly; it keeps that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import InputError
from .explicit_base import EXPLICIT, GridAdapter, Swap, table_values
from .explicit_edm import check_edm_range
from .explicit_flow import check_flow_range
from .recognise import own_option
from .schedules import EDMSchedule


@EXPLICIT.register("DEISMultistepScheduler")
@EXPLICIT.register("DPMSolverMultistepScheduler")
@EXPLICIT.register("DPMSolverSinglestepScheduler")
@EXPLICIT.register("UniPCMultistepScheduler")
class SigmaGrid(GridAdapter):
    """The DPM-Solver family. Where it stops (clean data, or its smallest noise level) is the scheduler's affair.

    The single-step solver evaluates the network once per listed time: the listed times inside one of its steps are
    the intermediate points of that step, wherever they lie. Its third order needs them near the thirds of log-SNR, as
    on any smooth grid of many steps; on a rough one it is second order. DEIS and SA-Solver with flow sigmas stop at
    the last listed time, as diffusers has it.
    """

    def check_range(self, timesteps: tuple[float, ...]) -> None:
        if own_option(self.scheduler, "use_flow_sigmas"):
            check_flow_range(timesteps, self.scheduler.config.num_train_timesteps)
        else:
            super().check_range(timesteps)
        if getattr(self.scheduler, "solver_p", None) is not None:
            raise InputError("UniPC with a separate solver_p cannot run an explicit grid; leave solver_p out")

    def set_timesteps(self, base: Callable[..., None], device: Any) -> None:
        scheduler, flow = self.scheduler, own_option(self.scheduler, "use_flow_sigmas")
        dynamic = {"mu": 1.0} if flow and own_option(scheduler, "use_dynamic_shifting") else {}
        base(len(self.timesteps), device=device, **dynamic)
        sigmas = self._flow_sigmas() if flow else self._table_sigmas()
        to_zero = own_option(scheduler, "final_sigmas_type") == "zero"
        last = scheduler.sigmas[-1] if to_zero or not flow else sigmas[-1]
        scheduler.sigmas = torch.cat([sigmas, last.reshape(1)])
        scheduler.timesteps = self.reported.to(device)

    def _table_sigmas(self) -> Tensor:
        """sigma/alpha at the listed times, float32 as the scheduler keeps it."""
        alphas: Tensor = self.scheduler.alphas_cumprod.cpu()
        between = self.process.sigma(self.timesteps) / self.process.alpha(self.timesteps)
        return table_values(((1 - alphas) / alphas).sqrt(), self.timesteps, between)

    def _flow_sigmas(self) -> Tensor:
        """sigma at the listed times; 1 is kept off by 1e-6, where the log-SNR is infinite."""
        sigmas: Tensor = self.timesteps / self.scheduler.config.num_train_timesteps
        return sigmas.clamp(max=1 - 1e-6).float()


@EXPLICIT.register("SASolverScheduler")
class SASolverGrid(SigmaGrid):
    """SA-Solver (arXiv:2309.05019), whose ``add_noise`` indexes a table and so knows whole timesteps only."""

    def add_noise(self, base: Callable[..., Tensor], sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.process.add_noise(sample, noise, timesteps)


@EXPLICIT.register("EulerAncestralDiscreteScheduler")
@EXPLICIT.register("EulerDiscreteScheduler")
@EXPLICIT.register("LMSDiscreteScheduler")
class KarrasGrid(GridAdapter):
    """The k-diffusion family, one evaluation per listed time.

    ``EulerDiscreteScheduler`` with continuous v-prediction is EDM, told log(sigma)/4. Its
    ``interpolation_type='log_linear'`` would override any timesteps given to diffusers itself; here they stand.
    """

    def check_range(self, timesteps: tuple[float, ...]) -> None:
        if isinstance(self.process.schedule, EDMSchedule):
            check_edm_range(timesteps, self.process)
        else:
            super().check_range(timesteps)

    def set_timesteps(self, base: Callable[..., None], device: Any) -> None:
        scheduler = self.scheduler
        base(len(self.timesteps), device=device)
        sigmas = torch.from_numpy(self.sigmas().astype(np.float32))
        scheduler.sigmas = torch.cat([sigmas, scheduler.sigmas[-1:]])
        scheduler.timesteps = self.timesteps.float().to(device)

    def sigmas(self) -> NDArray[np.float64]:
        """sigma/alpha at the listed times: linear in the scheduler's table, which is what its own grids do."""
        if isinstance(self.process.schedule, EDMSchedule):
            exact: NDArray[np.float64] = self.process.sigma(self.timesteps).numpy()
            return exact
        alphas: Tensor = self.scheduler.alphas_cumprod.cpu()
        table = ((1 - alphas) / alphas).sqrt().numpy()
        sigmas: NDArray[np.float64] = np.interp(self.timesteps.numpy(), np.arange(len(table)), table)
        return sigmas


@EXPLICIT.register("HeunDiscreteScheduler")
class HeunGrid(KarrasGrid):
    """Heun (arXiv:2206.00364, algorithm 1), two evaluations per step: ``timesteps`` has all but the first twice."""

    def set_timesteps(self, base: Callable[..., None], device: Any) -> None:
        base(timesteps=self.timesteps.tolist(), device=device)


@EXPLICIT.register("DPMSolverSDEScheduler")
@EXPLICIT.register("KDPM2AncestralDiscreteScheduler")
@EXPLICIT.register("KDPM2DiscreteScheduler")
class MidpointGrid(KarrasGrid):
    """Schedulers with an evaluation of their own inside each step: ``timesteps`` has it between two listed ones.

    Where it lies is the scheduler's formula: halfway in log-sigma to the next sigma (of DPM2 ancestral: to the one
    it steps down to), and the time of that sigma in the scheduler's table. These schedulers take no list, but they
    have hooks: their exponential spacing asks one of their methods for the sigmas. It is given the listed ones.
    """

    def set_timesteps(self, base: Callable[..., None], device: Any) -> None:
        scheduler, sigmas = self.scheduler, self.sigmas()
        scheduler.register_to_config(use_exponential_sigmas=True)
        try:
            with Swap(scheduler, _convert_to_exponential=lambda **_: sigmas):
                base(len(self.timesteps), device=device)
        finally:
            scheduler.register_to_config(use_exponential_sigmas=False)
        single = type(scheduler).__name__ != "DPMSolverSDEScheduler"  # which keeps its timesteps in float64
        timesteps = scheduler.timesteps.float() if single else scheduler.timesteps
        timesteps[0::2] = self.timesteps.to(timesteps)
        scheduler.timesteps = timesteps
