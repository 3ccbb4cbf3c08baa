"""What a call of an attached pipeline did, counted and not assumed."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of the scheduler.

    Attributes:
        timestep: the time the scheduler was stepped from, in the network's units.
        rows: rows of all network evaluations since the step before; a batch that is doubled for guidance counts double.
        evaluations: forward passes since the step before.
    """

    timestep: float
    rows: int
    evaluations: int


@dataclass(frozen=True, slots=True)
class Stats:
    """One call of the pipeline.

    Attributes:
        nfe: network evaluations per image; a guided step of a batch-doubling pipeline counts 2.
        rows: rows of all network evaluations together.
        images: number of images (videos, clips) that the call returned.
        steps: one record per step of the scheduler.
        finished: False when the call raised; ``images`` and ``nfe`` are 0 then.
        warnings: what the user should know about this plan on this pipeline.
    """

    nfe: float
    rows: int
    images: int
    steps: tuple[StepRecord, ...]
    finished: bool
    warnings: tuple[str, ...] = ()


@dataclass
class Counter:
    """Counts one call while it runs."""

    rows: int = 0
    steps: list[StepRecord] = field(default_factory=list)
    _rows_of_step: int = 0
    _evaluations_of_step: int = 0

    def evaluation(self, rows: int) -> None:
        """Counts one forward pass of the denoiser over ``rows`` rows."""
        self.rows += rows
        self._rows_of_step += rows
        self._evaluations_of_step += 1

    def step(self, timestep: Any) -> None:
        """Closes one step of the scheduler."""
        self.steps.append(StepRecord(float(timestep), self._rows_of_step, self._evaluations_of_step))
        self._rows_of_step = self._evaluations_of_step = 0

    def add(self, stats: Stats) -> None:
        """Adds what another call counted."""
        self.rows += stats.rows
        self.steps.extend(stats.steps)

    def stats(self, images: int, finished: bool, warnings: tuple[str, ...]) -> Stats:
        """The finished count."""
        nfe = self.rows / images if images else 0.0
        return Stats(nfe, self.rows, images, tuple(self.steps), finished, warnings)


def count_images(output: Any) -> int:
    """Number of images in what a pipeline returned (its first field, a list or an array)."""
    first = output[0] if isinstance(output, tuple) else next(iter(vars(output).values()), None)
    if isinstance(first, Tensor):
        return first.shape[0]
    return len(first) if isinstance(first, Sized) else 1
