"""Which steps of a cache compute, by what it costs to forecast the others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .cache_costs import Costs

LONGEST = 8
"Most steps in a row that are forecast."

APART = 0.3
"Share of the costs that add up step by step in what steps are moved for; the rest is that of errors which cancel."

_Best = dict[tuple[tuple[int, ...], int], tuple[float, tuple[int, ...]]]


def cheapest_steps(costs: Costs, order: int, longest: int = LONGEST) -> dict[int, tuple[int, ...]]:
    """For each number of steps that compute, which to choose so that the costs are least, by dynamic programming.

    A forecast of order m depends on the last m + 1 steps that computed: these are the state. Numbers that would need
    longer runs of forecasts are left out.

    Args:
        costs: the costs; the first step computes.
        order: of the forecast.
        longest: most steps in a row that are forecast.
    """
    return _cheapest(costs, order, longest, 0.0, counted=True)


def worthwhile_steps(costs: Costs, order: int, price: float, longest: int = LONGEST) -> tuple[int, ...]:
    """The steps that compute where each one that does costs ``price``, so that price and costs are least together."""
    (found,) = _cheapest(costs, order, longest, price, counted=False).values()
    return found


def _cheapest(costs: Costs, order: int, longest: int, price: float, counted: bool) -> dict[int, tuple[int, ...]]:
    by_last: list[_Best] = [{} for _ in range(costs.steps)]
    by_last[0][(0,), 1] = (price, (0,))
    ends: dict[int, tuple[float, tuple[int, ...]]] = {}
    for last, states in enumerate(by_last):
        for (past, count), (cost, chosen) in states.items():
            for until in range(last + 1, min(costs.steps, last + longest + 1) + 1):
                cost += costs.of(until - 1, past) if until - 1 > last else 0.0
                if until == costs.steps:
                    ends[count] = min(ends.get(count, (cost, chosen)), (cost, chosen))
                    break
                key = (until, *past)[: order + 1], count + counted
                new = (cost + price, (*chosen, until))
                by_last[until][key] = min(by_last[until].get(key, new), new)
    return {count: chosen for count, (_, chosen) in sorted(ends.items())}


def refined_steps(costs: Costs, chosen: Sequence[int], order: int) -> tuple[int, ...]:
    """Moves one chosen step at a time for as long as `predicted` falls; the first one stays.

    The errors of forecasts have signs, and those of some choices cancel, which no sum over steps can tell.
    """
    best, steps = predicted(costs, chosen, order), tuple(chosen)
    while True:
        moved = [
            tuple(sorted({*steps[:place], to, *steps[place + 1 :]}))
            for place, to in itertools.product(range(1, len(steps)), range(1, costs.steps))
            if to not in steps
        ]
        allowed = [other for other in moved if longest_run(other, costs.steps) <= LONGEST]
        least, found = min(((predicted(costs, other, order), other) for other in allowed), default=(best, steps))
        if least >= best:
            return steps
        best, steps = least, found


def predicted(costs: Costs, chosen: Sequence[int], order: int) -> float:
    """What a choice of steps is expected to cost: mostly the errors added up with their signs."""
    return costs.together(chosen, order) + APART * costs.apart(chosen, order)


def longest_run(chosen: Sequence[int], steps: int) -> int:
    """Most steps in a row that do not compute."""
    return max(until - last - 1 for last, until in itertools.pairwise((*chosen, steps)))
