"""One small case for each distillation method: what it is trained with in the tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from tiny import tiny_dit, tiny_scheduler

from fewstep.distill.encoder import Encoder
from fewstep.distill.lora import LoraSetting
from fewstep.distill.method import METHODS, Method, seed_of
from fewstep.distill.shards import Sharing, own_part, shape_of
from fewstep.distill.sources import Batch
from fewstep.distill.team import Team, make_team
from fewstep.samplers import Process

LABELS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Case:
    """A method with options that make it cheap.

    Attributes:
        options: fields of the method.
        steps: a number of steps that its student can be sampled in.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 2


CASES = {
    "adversarial-consistency": Case({"grid_steps": 10, "feature_maps": 1}),
    "dmd2": Case({"fake_updates": 2, "student_steps": 2, "gan_weight": 0.1}),
    "mmd": Case({"student_steps": 2, "checkpoint_steps": True}),
    "sim": Case(steps=1),
    "swiftbrush": Case({"fake_rank": 2}, steps=1),
    "guided": Case({"embed_guidance": False, "guidance_scale": (3.0,)}, steps=3),
    "guided-lora": Case(steps=3),
    "instaflow": Case(steps=1),
    "progressive": Case({"teacher_steps": 8, "final_steps": 2, "stage_steps": 2}),
    "reflow": Case(steps=3),
    "scm": Case({"warmup_steps": 2}, steps=3),
    "cd": Case({"grid_steps": 6, "guidance_scale": (2.0,)}),
    "ect": Case({"stage_steps": 2}),
    "icd": Case({"grid_steps": 6, "segments": 2}),
    "lcf": Case({"grid_steps": 10}),
    "lcm": Case({"grid_steps": 10, "guidance_scale": (2.0, 4.0)}),
    "lcm-lora": Case({"grid_steps": 10, "guidance_scale": (3.0,)}),
    "pcm": Case({"grid_steps": 9, "phases": 3}, steps=3),
    "tcd": Case({"grid_steps": 10}, steps=3),
    "tscd": Case({"grid_steps": 8, "segments": (4, 2), "stage_steps": 2}, steps=4),
}


def method_of(name: str) -> Method:
    return METHODS[name](**CASES[name].options)


@cache
def _encoder() -> Encoder:
    return Encoder(tiny_dit(), {"guidance_scale": 2.0})


class TinySource:
    """Samples of the tiny DiT, with all that a method may ask for."""

    def batch(self, index: int, positions: range) -> Batch:
        numbers = [100 * index + position for position in positions]
        x0, start = (
            torch.stack([torch.randn(4, 4, 4, generator=_seeded(number, what)) for number in numbers])
            for what in ("x0", "start")
        )
        return Batch(torch.tensor(numbers), _condition(tuple(LABELS[n % 4] for n in numbers)), x0, start)


@cache
def _condition(labels: tuple[int, ...]) -> Any:
    return _encoder().encode(list(labels))


def _seeded(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))


def team_of(method: Method, lora: bool, average: bool = False, sharing: Sharing | None = None) -> Team:
    process = Process.from_scheduler(tiny_scheduler())
    setting = LoraSetting(rank=2, alpha=3.0) if lora else None
    team = make_team(tiny_dit().transformer, process, method, setting, 2.0, 0, average, sharing)
    with torch.no_grad():  # roles that differ, as after some training
        for role in team.roles.trained:
            for name, parameter in team.trainable(role).items():
                moved = 0.05 * torch.randn(shape_of(parameter), generator=_seeded(role, name))
                parameter += own_part(moved, parameter)
    return team
