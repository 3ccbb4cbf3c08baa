"""What a call of an attached pipeline did, counted and not assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sized
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
        network: the network that ran the last of them: the pipeline's name of it, or the plan's for another one.
    """

    timestep: float
    rows: int
    evaluations: int
    network: str = ""


@dataclass(frozen=True, slots=True)
class Work:
    """What a part of the plan spent besides the steps of the call.

    Attributes:
        name: who: the scorer of an escalation, its teacher.
        samples: how many samples it worked on.
        evaluations: how often it was asked: calls of a scorer, forward passes of a teacher.
        seconds: wall time.
    """

    name: str
    samples: int
    evaluations: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ModuleRows:
    """What a cache made of one module in one call.

    Attributes:
        calls: forward passes of the module; of some of the rows each, where the cache decides by row.
        run: rows that ran.
        skipped: rows that were answered from the cache.
    """

    calls: int = 0
    run: int = 0
    skipped: int = 0


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
        rows_by_network: ``rows`` by network: the pipeline's own by component name, others by the plan's name.
        work: what parts of the plan spent besides the steps; the rows of a teacher are in ``rows`` too.
        modules: of each module that a cache decides about, by component, a dot, and name, what was run and skipped. A
            module within one that is skipped is not asked and counts neither.
        cache_bytes: most bytes that the caches kept at once.
    """

    nfe: float
    rows: int
    images: int
    steps: tuple[StepRecord, ...]
    finished: bool
    warnings: tuple[str, ...] = ()
    rows_by_network: Mapping[str, int] = field(default_factory=dict)
    work: tuple[Work, ...] = ()
    modules: Mapping[str, ModuleRows] = field(default_factory=dict)
    cache_bytes: int = 0


@dataclass
class Counter:
    """Counts one call while it runs."""

    rows: int = 0
    steps: list[StepRecord] = field(default_factory=list)
    rows_by_network: dict[str, int] = field(default_factory=dict)
    work: list[Work] = field(default_factory=list)
    modules: dict[str, ModuleRows] = field(default_factory=dict)
    cache_bytes: int = 0
    _rows_of_step: int = 0
    _evaluations_of_step: int = 0
    _network_of_step: str = ""

    def evaluation(self, rows: int, network: str = "") -> None:
        """Counts one forward pass of a denoiser over ``rows`` rows."""
        self.rows += rows
        self.rows_by_network[network] = self.rows_by_network.get(network, 0) + rows
        self._rows_of_step += rows
        self._evaluations_of_step += 1
        self._network_of_step = network

    def module(self, name: str, run: int, skipped: int, calls: int | None = None) -> None:
        """Counts rows of a module that a cache ran and skipped, in one forward pass unless ``calls`` says otherwise."""
        before = self.modules.get(name, ModuleRows())
        calls = int(run > 0) if calls is None else calls
        self.modules[name] = ModuleRows(before.calls + calls, before.run + run, before.skipped + skipped)

    def held(self, size: int) -> None:
        """Notes the bytes that the caches keep now."""
        self.cache_bytes = max(self.cache_bytes, size)

    def step(self, timestep: Any) -> None:
        """Closes one step of the scheduler."""
        record = StepRecord(float(timestep), self._rows_of_step, self._evaluations_of_step, self._network_of_step)
        self.steps.append(record)
        self._rows_of_step = self._evaluations_of_step = 0
        self._network_of_step = ""

    def add(self, stats: Stats) -> None:
        """Adds what another call counted."""
        self.rows += stats.rows
        self.steps.extend(stats.steps)
        self.work.extend(stats.work)
        for network, rows in stats.rows_by_network.items():
            self.rows_by_network[network] = self.rows_by_network.get(network, 0) + rows
        for name, module in stats.modules.items():
            self.module(name, module.run, module.skipped, module.calls)
        self.held(stats.cache_bytes)

    def stats(self, images: int, finished: bool, warnings: tuple[str, ...]) -> Stats:
        """The finished count."""
        return Stats(
            nfe=self.rows / images if images else 0.0,
            rows=self.rows,
            images=images,
            steps=tuple(self.steps),
            finished=finished,
            warnings=warnings,
            rows_by_network=dict(self.rows_by_network),
            work=tuple(self.work),
            modules=dict(self.modules),
            cache_bytes=self.cache_bytes,
        )


def count_images(output: Any) -> int:
    """Number of images in what a pipeline returned (its first field, a list or an array)."""
    first = output[0] if isinstance(output, tuple) else next(iter(vars(output).values()), None)
    if isinstance(first, Tensor):
        return first.shape[0]
    return len(first) if isinstance(first, Sized) else 1
