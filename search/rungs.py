"""Settings of a cache that were tried on a few samples, and the ladder of those that none of the others betters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..samplers import CachePart, Plan
from .cache_costs import Costs, Sample, squared_error, with_cache
from .step_choice import LONGEST, cheapest_steps, longest_run, predicted, refined_steps

ORDERS = (0, 1, 2)
"Of the forecast."

COUNTS = 20
"Most numbers of steps for which a choice is tried."

TRIED = 2
"Choices of each number of steps that are tried, each of another order."

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
    """

    plan: Plan
    plain: Tensor
    sample: Sample

    def rung(self, part: CachePart, share: float) -> Rung:
        """What a setting does that computes ``share`` of the work."""
        return Rung(part, share, squared_error(self.sample(with_cache(self.plan, part)), self.plain))

    def whole_steps(self, make: Make, costs: Costs) -> list[Rung]:
        """Settings in which whole steps compute."""
        return [self.rung(make(chosen, order), len(chosen) / costs.steps) for chosen, order in whole_steps(costs)]


def whole_steps(costs: Costs) -> list[tuple[tuple[int, ...], int]]:
    """Choices of steps and orders that are worth a try: for each number of steps the best ones by prediction.

    Args:
        costs: of all that the cache decides about.
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
    return found


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
