"""A method that needs no diffusion: a student learns a linear map, a fake follows the student, a target averages it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

from fewstep.distill.loop import Loop, Outcome
from fewstep.distill.loop_options import LoopOptions
from fewstep.distill.method import Loss, Method, Moment
from fewstep.distill.role_kinds import Kind
from fewstep.distill.run_log import make_accelerator
from fewstep.distill.schedule import Average, Schedule, Stage
from fewstep.samplers import Plan, Process

WIDTH = 4
TRUTH = torch.linspace(-1.0, 1.0, WIDTH * WIDTH).view(WIDTH, WIDTH)


class ToyRoles:
    """Student, fake, and an average of the student."""

    def __init__(self, width: int = WIDTH) -> None:
        generator = torch.Generator().manual_seed(7)
        self.networks = {role: nn.Linear(width, width) for role in ("student", "fake", "target")}
        for parameter in nn.ModuleDict(self.networks).parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        self.networks["target"].requires_grad_(False)
        self.updated: list[str] = []

    def __getitem__(self, role: str) -> nn.Linear:
        return self.networks[role]

    def trainable(self, role: str) -> dict[str, nn.Parameter]:
        return dict(self.networks[role].named_parameters())

    def update_ema(self, role: str, decay: float) -> None:
        with torch.no_grad():
            for mine, its in zip(self[role].parameters(), self["student"].parameters(), strict=True):
                mine.lerp_(its, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        tensors = nn.ModuleDict(self.networks).state_dict()
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        nn.ModuleDict(self.networks).load_state_dict(dict(state))


class ToySource:
    """Vectors that the index and the position decide."""

    def __init__(self, before: Callable[[int], None] = lambda index: None, width: int = WIDTH) -> None:
        self.before, self.width = before, width

    def batch(self, index: int, positions: range) -> Tensor:
        self.before(index)
        seeds = (1000 * index + position for position in positions)
        return torch.stack([torch.randn(self.width, generator=torch.Generator().manual_seed(s)) for s in seeds])


class Toy(Method):
    """Its fake is updated in every turn, its student in the last of ``fakes``."""

    type: Literal["toy"] = "toy"
    fakes: int = 2
    dropout: float = 0.5
    noise: float = 0.1
    poison: int | None = None
    halves: int | None = None

    def kinds(self, student: Kind, network: nn.Module) -> dict[str, Kind]:
        return {"student": student}

    def plan(self, process: Process, steps: int) -> Plan:
        return Plan()

    def losses(self, batch: Any, roles: Any, moment: Moment) -> Iterator[Loss]:
        noise = self.noise * moment.rows(lambda generator: torch.randn(batch.shape[1:], generator=generator))
        made = roles["student"](nn.functional.dropout(batch, self.dropout))
        if "student" in moment.updates:
            wanted = batch @ TRUTH[: batch.shape[1], : batch.shape[1]] + noise
            bad = float("nan") if self.poison == moment.step else 1.0
            yield Loss("match", "student", bad * (made - wanted).square().sum(1))
            yield Loss("size", "student", 0.01 * roles["student"](batch).abs().sum(1))
        if "fake" in moment.updates:
            yield Loss("follow", "fake", (roles["fake"](batch) - made.detach()).square().sum(1))

    def turns(self) -> Schedule:
        cycle = (("fake",),) * (self.fakes - 1) + (("fake", "student"),)
        later = () if self.halves is None else (Stage(cycle, start=self.halves, fresh=("student",)),)
        return Schedule((Stage(cycle), *later), (Average("target", 0.9),), rates={"fake": 2.0})

    def enter_stage(self, stage: int, roles: Any) -> None:
        roles["fake"].load_state_dict(roles["student"].state_dict())


def options(folder: Path, steps: int = 6, **changes: Any) -> LoopOptions:
    settings: dict[str, Any] = {"train_batch_size": 4, "learning_rate": 0.05, "checkpointing_steps": 2} | changes
    return LoopOptions(output_dir=folder, max_train_steps=steps, **settings)


def train(
    settings: LoopOptions,
    method: Method | None = None,
    roles: Any = None,
    before: Callable[[int], None] = lambda index: None,
    **more: Any,
) -> tuple[dict[str, Tensor], Outcome]:
    """Final tensors of all roles, and how the run ended."""
    roles = roles or ToyRoles()
    loop = Loop(method or Toy(), roles, ToySource(before), settings, fresh_accelerator(settings), **more)
    outcome = loop.run()
    return roles.state(), outcome


def fresh_accelerator(settings: LoopOptions) -> Accelerator:
    """An accelerator that knows nothing of earlier ones in this process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return make_accelerator(settings, cpu=True)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
