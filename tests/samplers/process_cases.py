"""Processes of every kind, and what their tests share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.samplers.prediction import EDM, EDMVelocity, Epsilon, Flow, InvertedFlow, Sample, Velocity
from fewstep.samplers.process import Process
from fewstep.samplers.schedules import (
    ArctanEDMSchedule,
    EDMSchedule,
    FlowSchedule,
    InvertedFlowSchedule,
    TableSchedule,
    TrigSchedule,
)


def draws(*, batch: int = 3, count: int = 2, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


ZERO_TABLE = tuple(np.linspace(0.99, 0.0, 12) ** 2)
PROCESSES = {
    "epsilon": Process(TableSchedule(ZERO_TABLE[:-1]), Epsilon()),
    "v": Process(TableSchedule(ZERO_TABLE), Velocity()),
    "sample": Process(TableSchedule(ZERO_TABLE), Sample()),
    "flow": Process(FlowSchedule(), Flow()),
    "flow epsilon": Process(FlowSchedule(), Epsilon()),
    "inverted flow": Process(InvertedFlowSchedule(), InvertedFlow()),
    "edm": Process(EDMSchedule(), EDM(0.5)),
    "edm v": Process(EDMSchedule(sigma_max=700.0, sigma_data=1.0), EDMVelocity(1.0)),
    "arctan edm": Process(ArctanEDMSchedule(0.3, 500.0, 1.0), EDMVelocity(1.0)),
    "trig": Process(TrigSchedule(), Velocity()),
}
any_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
