"""A team of denoisers in closed form, and batches for it: what a method's losses are, without networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.distill.jumps import Denoiser
from fewstep.distill.method import Method, Moment
from fewstep.distill.sources import Batch
from fewstep.samplers import Process


@dataclass(frozen=True)
class AnalyticTeam:
    """Stands for a `Team` without guidance."""

    process: Process
    roles: Mapping[str, Denoiser]

    def denoiser(self, role: str, condition: Any, **options: bool) -> Denoiser:
        return self.roles[role]

    def guided(self, role: str, condition: Any, scale: Any, **options: bool) -> Denoiser:
        return self.roles[role]

    def scales(self, ends: Sequence[float], count: int, draws: Any) -> Tensor:
        return torch.ones(count, dtype=torch.float64)

    def paired_noise(self) -> AbstractContextManager[None]:
        return nullcontext()


def moment_at(step: int = 0, stage: int = 0, rows: int = 8) -> Moment:
    return Moment(step, step, stage, step, ("student",), 5, range(rows))


def loss_of(method: Method, process: Process, roles: Mapping[str, Denoiser], x0: Tensor, **more: Any) -> Tensor:
    """The only loss (B,) of a method on samples (B, ...)."""
    moment = more.pop("moment", None) or moment_at(rows=len(x0))
    batch = Batch(torch.arange(len(x0)), None, x0, **more)  # type: ignore[arg-type]
    (loss,) = method.losses(batch, AnalyticTeam(process, roles), moment)
    return loss.value
