"""Settings of a cache that were tried on a few samples, and the ladder of those that none of the others betters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..samplers import CachePart, Plan
from ..samplers.step_rehash import StepRehash
from .cache_costs import Costs, Sample, squared_error, with_cache
from .step_choice import LONGEST, cheapest_steps, longest_run, predicted, refined_steps

ORDERS = (0, 1, 2)
"Of the forecast."

COUNTS = 20
"Most numbers of steps for which a choice is tried."

TRIED = 2
"Choices of each number of steps that are tried for their prediction, each of another order."

Make = Callable[[Sequence[int], int], CachePart]
"""From the steps that compute and the order of the forecast to the cache."""


@dataclass(frozen=True)
class Rung:
    """A setting that was tried.

    Attributes:
        part: the setting.
        share: of the cache's work, what is computed.
        error: mean squared error of the samples.
    """

    part: CachePart
    share: float
    error: float


@dataclass(frozen=True)
class Tries:
    """Tries settings on a few samples.

    Attributes:
        plan: without the cache.
        plain: the samples of the plan.
        sample: runs a plan.
        changes: of the features from step to step, where they were measured.
    """

    plan: Plan
    plain: Tensor
    sample: Sample
    changes: tuple[float, ...] = ()

    def rung(self, part: CachePart, share: float) -> Rung:
        """What a setting does that computes ``share`` of the work."""
        return Rung(part, share, squared_error(self.sample(with_cache(self.plan, part)), self.plain))

    def whole_steps(self, make: Make, costs: Costs) -> list[Rung]:
        """Settings in which whole steps compute."""
        tried = whole_steps(costs, self.changes)
        return [self.rung(make(chosen, order), len(chosen) / costs.steps) for chosen, order in tried]


def whole_steps(costs: Costs, changes: tuple[float, ...] = ()) -> list[tuple[tuple[int, ...], int]]:
    """Choices of steps and orders that are worth a try, for each number of steps.

    The best ones by prediction; and since a prediction may be wrong, the steps of equal change at every order.

    Args:
        costs: of all that the cache decides about.
        changes: of the features from each step to the next; without them no steps of equal change are tried.
    """
    cheapest = {order: cheapest_steps(costs, order) for order in ORDERS}
    counts = [count for count in cheapest[0] if count < costs.steps]
    tried = min(COUNTS, len(counts))
    found = []
    for index in range(tried):
        count = counts[index * (len(counts) - 1) // max(1, tried - 1)]
        best = []
        for order in ORDERS:
            starts = {cheapest[order][count], even_steps(costs.steps, count)}
            choices = {refined_steps(costs, start, order) for start in starts} | starts
            allowed = [chosen for chosen in choices if longest_run(chosen, costs.steps) <= LONGEST]
            best.append(min((predicted(costs, chosen, order), chosen, order) for chosen in allowed))
        found += [(chosen, order) for _, chosen, order in sorted(best)[:TRIED]]
        found += [(equal_change_steps(changes, count), order) for order in ORDERS if changes]
    return list(dict.fromkeys(found))


def equal_change_steps(changes: tuple[float, ...], count: int) -> tuple[int, ...]:
    """At most so many steps, between which the changes of the features add up to much the same (`StepRehash`)."""
    table = StepRehash(changes=changes, budget=count).table()
    return tuple(step for step, (computes,) in enumerate(table) if computes)


def even_steps(steps: int, count: int) -> tuple[int, ...]:
    """So many of ``steps`` steps, spread evenly from the first one on."""
    return tuple(math.floor(index * steps / count) for index in range(count))


def ladder_of(rungs: Sequence[Rung]) -> tuple[CachePart, ...]:
    """Those that no other setting betters in both work and error, from the mildest to the boldest."""
    kept: list[Rung] = []
    for rung in sorted(rungs, key=lambda rung: (rung.share, rung.error)):
        if not kept or rung.error < kept[-1].error:
            kept.append(rung)
    return tuple(rung.part for rung in reversed(kept))
