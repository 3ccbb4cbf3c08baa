"""Which roles are updated when: turns, stages, learning rates and averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from diffusers.optimization import get_scheduler

RateName = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts"]
"""Learning-rate schedules, by the names they have in diffusers."""


@dataclass(frozen=True)
class Counters:
    """How far a run is.

    Attributes:
        step: updates of the leading role.
        turn: turns of all kinds, which is the number of global batches taken.
        stage: the stage that was entered last.
        position: place in the stage's cycle of the turn to come.
    """

    step: int = 0
    turn: int = 0
    stage: int = 0
    position: int = 0


@dataclass(frozen=True)
class Stage:
    """A part of the run with its own order of updates.

    Attributes:
        cycle: the roles that each turn updates, over and over. ``(("fake",),) * 4 + (("fake", "student"),)`` updates
            the fake score in every turn and the student in every fifth.
        start: updates of the leading role before this stage begins.
        fresh: roles whose optimiser starts anew with this stage.
    """

    cycle: tuple[tuple[str, ...], ...] = (("student",),)
    start: int = 0
    fresh: tuple[str, ...] = ()


AVERAGE = "average"
"The role that averages the student over the run, to be sampled with; a method's target is another."


@dataclass(frozen=True)
class Average:
    """A role that is the moving average of another one, moved after each update of the leading role.

    Attributes:
        role: the average.
        decay: what it keeps of itself, in [0, 1], or that as a function of the updates so far.
    """

    role: str
    decay: float | Callable[[int], float]

    def at(self, step: int) -> float:
        """The decay after update number ``step`` (the first is 1)."""
        return self.decay if isinstance(self.decay, int | float) else self.decay(step)


@dataclass(frozen=True)
class Schedule:
    """Who is updated when.

    All counts are updates of one role, the leader. They do not depend on the number of processes, on the
    accumulation of gradients, or on how often the other roles are updated.

    Attributes:
        stages: in order; the first starts at 0.
        averages: moved after each update of the leader.
        rates: learning rate of a role as a multiple of the run's; 1 where it is not named.
        anneal_stages: whether the learning-rate schedule starts again with each stage and ends with it.
        leader: the role that is counted.

    Raises:
        ValueError: when the stages are out of order, or one never updates the leader.
    """

    stages: tuple[Stage, ...] = (Stage(),)
    averages: tuple[Average, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    anneal_stages: bool = False
    leader: str = "student"

    def __post_init__(self) -> None:
        starts = [stage.start for stage in self.stages]
        if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(f"stages must start at 0 and then later and later; got {starts}")
        for number, stage in enumerate(self.stages):
            if not any(self.leader in turn for turn in stage.cycle):
                raise ValueError(f"stage {number} never updates {self.leader!r}, so it would not end")

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles that are updated, in the order of their first update."""
        turns = (turn for stage in self.stages for turn in stage.cycle)
        return tuple(dict.fromkeys(role for turn in turns for role in turn))

    def due(self, counters: Counters) -> int:
        """The stage that the turn to come belongs to; it may not have been entered yet."""
        return sum(stage.start <= counters.step for stage in self.stages) - 1

    def updates(self, counters: Counters) -> tuple[str, ...]:
        """The roles that the turn to come updates."""
        return self.stages[counters.stage].cycle[counters.position]

    def after(self, counters: Counters) -> Counters:
        """The counters after the turn to come."""
        cycle = self.stages[counters.stage].cycle
        return Counters(
            step=counters.step + (self.leader in self.updates(counters)),
            turn=counters.turn + 1,
            stage=counters.stage,
            position=(counters.position + 1) % len(cycle),
        )

    def entered(self, counters: Counters, stage: int) -> Counters:
        """The counters at the start of a stage."""
        return Counters(counters.step, counters.turn, stage, 0)

    def span(self, counters: Counters, total: int) -> tuple[int, int]:
        """Updates of the leader so far, and at the end, that the learning-rate schedule goes by.

        Args:
            counters: of the turn to come.
            total: updates of the leader in the whole run.
        """
        if not self.anneal_stages:
            return counters.step, total
        start = self.stages[counters.stage].start
        later = [stage.start for stage in self.stages[counters.stage + 1 :]]
        return counters.step - start, min([total, *later]) - start


@lru_cache
def _factors(name: RateName, warmup: int, total: int) -> Callable[[int], float]:
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = get_scheduler(name, unused, num_warmup_steps=warmup, num_training_steps=total)
    factors: Callable[[int], float] = schedule.lr_lambdas[0]
    return factors


def rate_factor(name: RateName, step: int, warmup: int, total: int) -> float:
    """The learning rate as a multiple of its peak, by diffusers' schedule of that name.

    Args:
        name: of the schedule.
        step: updates so far; 0 for the first one.
        warmup: updates until the peak.
        total: updates at the end.
    """
    return float(_factors(name, warmup, total)(step))
