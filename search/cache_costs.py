"""What it costs in quality to reuse a feature, measured on a few trajectories.

The error that a reused feature leaves in the result is taken to be proportional to its squared change since it was
computed, by a factor of the step; and the errors of steps and modules to add up. One run in which nothing is reused
gives the changes between all steps; runs that reuse in a single step give the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..samplers import CacheHook, CachePart, InputError, Passing, Plan, Run
from ..samplers.mask import FeatureHook, MaskPart

GAP = 8
"Most steps in a row over which a change is measured, and so over which a feature is reused."

PROBES = 16
"Most steps whose factor is measured; between them it is interpolated."

Sample = Callable[[Plan], Tensor]
"""From a plan to the samples of the calibration, (n, ...)."""

Moved = Mapping[str, Mapping[int, Mapping[int, float]]]
"""Of each module and step, by the gap to an earlier step, the mean squared change of its feature a row."""


def measure_moves(plan: Plan, part: CachePart, names: Callable[[str], bool], sample: Sample) -> Moved:
    """Squared changes of the features that a cache reuses, over gaps of up to `GAP` steps.

    Args:
        plan: without the cache.
        part: the cache; it decides about the modules, and what is kept of them.
        names: which of its modules are looked at.
        sample: runs a plan.
    """
    watch = _Watch(part=part, names=names, found={})
    sample(plan.model_copy(update={"caches": (*plan.caches, watch)}))
    return {
        name: {step: {gap: sum(c) / len(c) for gap, c in gaps.items()} for step, gaps in steps.items()}
        for name, steps in watch.found.items()
    }


class _Watch(CachePart):
    """Runs everything and compares what the modules of another cache give with what they gave before."""

    type: Literal["moves"] = "moves"
    part: Any
    names: Any
    found: Any

    def reach(self, network: nn.Module) -> tuple[str, ...]:
        return tuple(self.part.reach(network))

    def computes(self, steps: int) -> None:
        return None

    def make(self, modules: Mapping[str, nn.Module], run: Run) -> CacheHook:
        chosen = {name: module for name, module in modules.items() if self.names(name)}
        residual = self.part.residual if isinstance(self.part, MaskPart) else lambda name: False
        return _Watching(chosen, frozenset(filter(residual, chosen)), self.found)


class _Watching(FeatureHook):
    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        residual: frozenset[str],
        found: dict[str, dict[int, dict[int, list[float]]]],
    ) -> None:
        super().__init__(modules, residual)
        self.found = found
        self.past: dict[tuple[str, int, str], list[tuple[int, list[Tensor]]]] = {}

    def pass_module(self, passing: Passing) -> Any:
        evaluation = passing.evaluation
        place = (evaluation.component, evaluation.branch, self.place(passing))
        output = passing.run()
        feature = self.feature(passing, output)
        now = [leaf.detach().clone() for leaf in tree_leaves(feature) if isinstance(leaf, Tensor)]
        past = self.past.setdefault(place, [])
        gaps = self.found.setdefault(passing.name, {}).setdefault(evaluation.index, {})
        for step, before in past:
            if step < evaluation.index and all(a.shape == b.shape for a, b in zip(before, now, strict=True)):
                squares = sum(float((a - b).square().sum()) for a, b in zip(before, now, strict=True))
                gaps.setdefault(evaluation.index - step, []).append(squares / evaluation.rows)
        past.append((evaluation.index, now))
        del past[:-GAP]
        return output


def measure_factors(
    plan: Plan, single: Callable[[int], CachePart], moved: Moved, steps: int, sample: Sample
) -> tuple[float, ...]:
    """Of each step, the squared error of the result for a squared change of 1 of all that is reused.

    Args:
        plan: without the cache.
        single: the cache that reuses in one step alone what was computed in the step before.
        moved: from `measure_moves`.
        steps: number of timesteps.
        sample: runs a plan.

    Raises:
        InputError: when nothing changes from one step to the next.
    """
    plain = sample(plan)
    count = min(PROBES, steps - 1)
    probes = sorted({round(1 + k * (steps - 2) / max(1, count - 1)) for k in range(count)})
    found: dict[int, float] = {}
    for step in probes:
        change = sum(gaps[step].get(1, 0.0) for gaps in moved.values() if step in gaps)
        if change > 0:
            error = sample(plan.model_copy(update={"caches": (*plan.caches, single(step))})) - plain
            found[step] = float(error.double().square().mean()) / change
    if not found:
        raise InputError("the features of this pipeline do not change from step to step; there is nothing to calibrate")
    return _interpolated(found, steps)


def _interpolated(found: Mapping[int, float], steps: int) -> tuple[float, ...]:
    """Values of all steps, geometric between those that were found and constant beyond them."""
    known = sorted(found)
    values = torch.tensor([max(found[step], 1e-30) for step in known], dtype=torch.float64).log()
    filled = []
    for step in range(steps):
        after = next((k for k, other in enumerate(known) if other >= step), len(known) - 1)
        before = max(0, after - 1) if known[after] > step else after
        width = known[after] - known[before]
        share = min(1.0, max(0.0, (step - known[before]) / width)) if width else 0.0
        filled.append(float(torch.lerp(values[before], values[after], share).exp()))
    return tuple(filled)


@dataclass(frozen=True)
class Costs:
    """Of each module, what a reuse costs: ``of[name][step][gap]``, infinite where it was not measured."""

    of: Mapping[str, Mapping[int, Mapping[int, float]]]

    @classmethod
    def from_measured(cls, moved: Moved, factors: Sequence[float]) -> Costs:
        """Squared changes times the factor of the step."""
        return cls(
            {
                name: {
                    step: {gap: factors[step] * change for gap, change in gaps.items()} for step, gaps in steps.items()
                }
                for name, steps in moved.items()
            }
        )

    def between(self, name: str, last: int, step: int) -> float:
        """The cost of reusing in ``step`` what was computed in ``last``."""
        return self.of[name].get(step, {}).get(step - last, float("inf"))

    def passed(self, name: str, last: int, until: int) -> float:
        """The cost of reusing in all steps between two that compute."""
        return sum(self.between(name, last, step) for step in range(last + 1, until))


def cheapest_steps(costs: Costs, name: str, steps: int) -> dict[int, tuple[int, ...]]:
    """For each number of steps that compute, which to choose so that the costs are least, by dynamic programming.

    Numbers that would need a longer gap than was measured are left out.

    Args:
        costs: the costs.
        name: the module.
        steps: number of timesteps; the first one computes.
    """
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(1, 0): (0.0, (0,))}
    for until in range(1, steps + 1):
        for count in range(1, until + 1):
            options = [
                (best[count, last][0] + costs.passed(name, last, until), best[count, last][1])
                for last in range(until)
                if (count, last) in best
            ]
            if options:
                cost, chosen = min(options)
                best[count + 1, until] = (cost, (*chosen, until))
    ends = {count - 1: best[count, steps] for count in range(2, steps + 2) if (count, steps) in best}
    return {count: chosen[:-1] for count, (cost, chosen) in ends.items() if cost < float("inf")}


def worthwhile_steps(costs: Costs, name: str, steps: int, price: float) -> tuple[int, ...]:
    """The steps that compute where each one that does costs ``price``, so that price and costs are least together."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (price, (0,))}
    for until in range(1, steps + 1):
        best[until] = min(
            (best[last][0] + costs.passed(name, last, until) + price, (*best[last][1], until)) for last in range(until)
        )
    return best[steps][1][:-1]
