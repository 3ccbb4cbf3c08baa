"""One or more steps of the teacher's probability-flow ODE, towards data or towards noise, each sample at its times.

A step holds some quantity of the prediction fixed: DDIM the noise, in the coordinate x/alpha against sigma/alpha,
Euler's step along a flow its velocity. With one prediction a step the landing is the same, alpha_s x0 + sigma_s eps, so
that ``euler`` is another name of ``ddim``. For Heun it matters: it holds the noise, and on flow matching the velocity
eps - x0, as diffusers' schedulers of that name do.

The teacher is a callable, guided where it should be (`predict.guided`). No step leaves a gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..samplers.errors import InputError
from ..samplers.linear import as_time
from ..samplers.prediction import Epsilon, Flow
from ..samplers.process import Process
from ..samplers.registry import Registry
from ..samplers.schedules import FlowSchedule
from .distances import wide
from .jumps import Denoiser
from .predict import Prediction


class Solver(ABC):
    """A one-step solver of the probability-flow ODE."""

    @torch.no_grad()
    def __call__(self, process: Process, teacher: Denoiser, x: Tensor, *times: Tensor) -> Tensor:
        """The state at the last of the times, shape of ``x``, at least float32, without gradient.

        Args:
            process: the noise levels.
            teacher: prediction at a state; never asked at clean data.
            x: state (B, ...) at the first time.
            times: two or more, each (B,): where x is, and where each step ends. A sample whose step ends where it
                begins stays.

        Raises:
            InputError: when there is no step, or a time is not permitted.
        """
        if len(times) < 2:
            raise InputError(f"a solver goes from a time to others; got {len(times)} of them")
        x = wide(x)
        for t, s in pairwise(times):
            x = self.step(process, teacher, x, as_time(t), as_time(s))
        return x

    @abstractmethod
    def step(self, process: Process, teacher: Denoiser, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One step from ``t`` to ``s``, float64 times of shape (B,)."""


SOLVERS: Registry[type[Solver]] = Registry("solver of the teacher")


@SOLVERS.register("euler")
@SOLVERS.register("ddim")
@dataclass(frozen=True)
class DDIM(Solver):
    """First order: alpha_s x0 + sigma_s eps, arXiv:2010.02502 equation 12. One evaluation."""

    def step(self, process: Process, teacher: Denoiser, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return _land(process, teacher(x, t), x, t, s)


@SOLVERS.register("heun")
@dataclass(frozen=True)
class Heun(Solver):
    """Second order: the mean of the slopes at both ends, arXiv:2206.00364 algorithm 1. Two evaluations.

    A step to clean data, or one that holds noise from zero SNR on, is of first order.
    """

    def step(self, process: Process, teacher: Denoiser, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        flow = isinstance(process.schedule, FlowSchedule)
        held = replace(process, prediction=Flow() if flow else Epsilon())
        first = teacher(x, t)
        landed = _land(process, first, x, t, s)
        plain = process.sigma(s) == 0
        if not flow:
            plain = plain | (process.alpha(t) == 0)
        second = teacher(landed, torch.where(plain, t, s))
        mean_eps = (first.eps + second.eps) / 2
        slope = mean_eps - (first.x0 + second.x0) / 2 if flow else mean_eps
        return _rows(plain, landed, held.jump(x, torch.where(plain, s, t), s, out=slope))


@SOLVERS.register("dpm2")
@dataclass(frozen=True)
class DPM2(Solver):
    """Second order: the slope at the middle of log-SNR, DPM-Solver-2 of arXiv:2206.00927 algorithm 1. Two evaluations.

    A step from zero SNR or to clean data has no middle, and is of first order.
    """

    def step(self, process: Process, teacher: Denoiser, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        first = teacher(x, t)
        start, end = process.log_snr(t), process.log_snr(s)
        plain = ~(start.isfinite() & end.isfinite())
        middle = torch.where(plain, t, process.time_of_log_snr(torch.where(plain, 0.0, (start + end) / 2)))
        second = teacher(_land(process, first, x, t, middle), middle)
        result = process.jump(x, torch.where(plain, s, t), s, eps=second.eps)
        return _rows(plain, _land(process, first, x, t, s), result)


def evenly(t: Tensor, s: Tensor, steps: int) -> Sequence[Tensor]:
    """The ``steps`` + 1 times from ``t`` to ``s``, even in the process's time, both ends exact.

    Args:
        t: (B,), where the first step begins.
        s: (B,), where the last one ends; finite.
        steps: at least 1.

    Raises:
        InputError: when ``steps`` is not positive.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1; got {steps}")
    inner = [torch.lerp(as_time(t), as_time(s), index / steps) for index in range(1, steps)]
    return [as_time(t), *inner, as_time(s)]


def _land(process: Process, prediction: Prediction, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return process.jump(x, t, s, x0=prediction.x0, eps=prediction.eps)


def _rows(chosen: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Per sample ``yes`` where chosen, else ``no``."""
    return torch.where(chosen.to(yes.device).view(-1, *(1,) * (yes.ndim - 1)), yes, no)
