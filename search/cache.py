"""Calibrates a cache to a quality budget: the setting that reuses most within it, for one pipeline and plan.

Every cache has a ladder of settings from the mildest to the boldest one. What a rung does to the samples is measured
by running it, paired with the plan without the cache; bisection finds the boldest rung within the budget, and fresh
seeds confirm it, or send it down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..eval.jackknife import Estimate
from ..samplers import (
    CachePart,
    Evidence,
    InputError,
    ModuleRows,
    Plan,
    TunedFor,
    denoisers,
    fingerprint,
)
from ..samplers.registry import Registry
from ..samplers.stats import Counter
from .budget import Budget, Judges
from .cache_costs import Sample
from .runs import batches, running

Call = Callable[[Sequence[int]], dict[str, Any]]
"""From the numbers of some samples to the arguments of a call for them, seeds included."""

Progress = Callable[[int, int], None]
"""Told the trajectories that were run and the most that there will be, in units of all samples."""

Ladder = Callable[[Any, Plan, int, Sample], Sequence[CachePart]]
"""From the pipeline, the plan without the cache, its number of steps and a way to sample a few, the settings of a cache
from the mildest to the boldest."""

LADDERS: Registry[Ladder] = Registry("cache to calibrate")

FRESH = 1 << 20
"Numbers of fresh samples start here."

MOST_RUNS = 45
"Trajectories of all samples that a calibration runs at the most; those of the few for the ladder count their share."


@dataclass(frozen=True)
class Trial:
    """One setting that was run.

    Attributes:
        part: the setting.
        value: the budget's metric.
        skipped: share of the rows of the cache's modules that were answered from it, by parameters of the modules.
        fresh: whether on seeds that the setting was not chosen on.
    """

    part: CachePart
    value: Estimate
    skipped: float
    fresh: bool = False


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
        plan: with the cache, and the evidence on fresh seeds.
        trials: all settings that were run, in order.
        trajectories: runs of all samples, those without the cache included.
    """

    plan: Plan
    trials: tuple[Trial, ...]
    trajectories: float


def search_cache(
    pipe: Any,
    plan: Plan,
    cache: str,
    budget: Budget,
    call: Call,
    n: int,
    *,
    judges: Judges | None = None,
    few: int = 8,
    batch_size: int = 16,
    seeds: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """The plan with the boldest setting of a cache within a budget.

    Args:
        pipe: the pipeline, with no plan attached; as it was afterwards.
        plan: the rest of the plan, with a grid; other caches that it has stay.
        cache: a name of `LADDERS`.
        budget: how far the samples may be from those without the cache.
        call: from numbers of samples to the arguments of a call for them: 0 to n - 1 to choose on, and the n from
            `FRESH` on to confirm.
        n: samples of each.
        judges: what the metric of the budget judges with.
        few: most samples on which the ladder is built, where a cache needs measurements for it; a quarter of n at most.
        batch_size: samples in a call.
        seeds: of the fresh samples, for the evidence.
        progress: told how far it is.

    Raises:
        InputError: when the plan has no grid, the metric lacks a judge, or no setting within the budget reuses a thing.
    """
    judges = judges or Judges()
    budget.check(judges)
    steps = plan.nominal_steps
    if steps is None or steps < 2:
        raise InputError(f"a cache is calibrated for a number of steps, at least 2; got a plan with {steps}")
    bench = _Bench(pipe, plan, budget, call, n, judges, batch_size, progress or (lambda done, most: None))
    rungs = LADDERS[cache](pipe, plan, steps, lambda plan: bench.run(plan, range(min(few, max(1, n // 4))))[0])
    found = _boldest(rungs, bench)
    chosen = _confirmed(rungs, found, bench, cache)
    network = next(iter(denoisers(pipe).values()))
    evidence = (
        _evidence(budget.metric, chosen.value, n, seeds),
        Evidence(metric="parameters_skipped", value=chosen.skipped, n=n, seeds=seeds),
    )
    changes = {
        "caches": (*plan.caches, chosen.part),
        "tuned_for": TunedFor(fingerprint=fingerprint(network), pipeline=type(pipe).__name__, steps=steps),
        "evidence": (*plan.evidence, *evidence),
    }
    return Calibration(plan.model_copy(update=changes), tuple(bench.trials), bench.trajectories)


def _evidence(metric: str, value: Estimate, n: int, seeds: tuple[int, int] | None) -> Evidence:
    against = "the same plan without the cache"
    return Evidence(metric=metric, value=value.value, se=value.se, n=n, seeds=seeds, against=against)


def _boldest(rungs: Sequence[CachePart], bench: _Bench) -> int:
    """The boldest rung within the budget by bisection; -1 when none is. A rung that reuses nothing is within it."""
    low, high = -1, len(rungs)
    while high - low > 1:
        middle = (low + high) // 2
        within = bench.budget.allows(bench.trial(rungs[middle]).value.value)
        low, high = (middle, high) if within else (low, middle)
    return low


def _confirmed(rungs: Sequence[CachePart], found: int, bench: _Bench, cache: str) -> Trial:
    """The trial of the boldest rung, from ``found`` down, that is within the budget on fresh seeds and reuses a thing.

    Raises:
        InputError: when there is none.
    """
    for index in range(found, -1, -1):
        trial = bench.trial(rungs[index], fresh=True)
        if not trial.skipped:
            break
        if bench.budget.allows(trial.value.value):
            return trial
    fired = [trial for trial in bench.trials if trial.skipped]
    mildest = min(fired, key=lambda trial: trial.skipped) if fired else None
    seen = f"; the mildest that did had {mildest.value.value:.4g}" if mildest else ""
    raise InputError(
        f"no setting of the {cache} cache within {bench.budget} reused anything in {bench.plan.nominal_steps} "
        f"steps{seen}; relax the budget or take more steps"
    )


@dataclass
class _Bench:
    """Runs settings, and remembers what they did."""

    pipe: Any
    plan: Plan
    budget: Budget
    call: Call
    n: int
    judges: Judges
    batch_size: int
    progress: Progress
    trials: list[Trial] = field(default_factory=list)
    trajectories: float = 0.0
    plain: dict[bool, Tensor] = field(default_factory=dict)

    def trial(self, part: CachePart, fresh: bool = False) -> Trial:
        """What a setting does."""
        numbers = range(FRESH, FRESH + self.n) if fresh else range(self.n)
        if fresh not in self.plain:
            self.plain[fresh], _ = self.run(self.plan, numbers)
        caches = (*self.plan.caches, part)
        samples, modules = self.run(self.plan.model_copy(update={"caches": caches}), numbers)
        mine = part.modules(self.pipe)
        skipped = _share_skipped({name: rows for name, rows in modules.items() if name in mine}, mine)
        trial = Trial(part, self.budget.measure(samples, self.plain[fresh], self.judges), skipped, fresh)
        self.trials.append(trial)
        return trial

    def run(self, plan: Plan, numbers: range) -> tuple[Tensor, dict[str, ModuleRows]]:
        """Samples of a plan, (n, ...) float on the CPU, images with channels first; and what its caches did."""
        counter = Counter()
        with running(self.pipe, plan, counter.add) as run:
            found = [run(self.call(batch), batch[0]).samples for batch in batches(numbers, self.batch_size)]
        self.trajectories += len(numbers) / self.n
        self.progress(round(self.trajectories), MOST_RUNS)
        return torch.cat(found), counter.modules


def _share_skipped(modules: Mapping[str, ModuleRows], by_name: Mapping[str, nn.Module]) -> float:
    """Share of the rows that were skipped, each module's weighted by its parameters."""
    sizes = {name: sum(p.numel() for p in by_name[name].parameters()) for name in modules}
    total = sum(sizes[name] * (rows.run + rows.skipped) for name, rows in modules.items())
    return sum(sizes[name] * rows.skipped for name, rows in modules.items()) / total if total else 0.0
