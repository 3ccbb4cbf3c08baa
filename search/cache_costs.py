"""What it costs in quality to reuse or forecast a feature, measured on a few trajectories.

The error that a feature which is not computed leaves in the result is taken to be proportional to the squared error of
its forecast, by a factor of the step. One run in which nothing is reused gives the products of the features of all
steps, and by them the error of every forecast; runs that reuse in a single step give the factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..samplers import CacheHook, CachePart, InputError, Passing, Plan, Run
from ..samplers.forecast import weights_at
from ..samplers.mask import FeatureHook, MaskPart

PROBES = 16
"Most steps whose factor is measured; between them it is interpolated."

LOOKED_AT = 4096
"Most values of a feature, for each row, that its products are estimated from."

Sample = Callable[[Plan], Tensor]
"""From a plan to the samples of the calibration, (n, ...)."""

Products = Mapping[str, Sequence[Tensor]]
"""Of each module, for each of its calls in an evaluation, the branch of guidance and the batch: (steps, steps) float64,
the inner products of its features at every two steps, a row; NaN at the steps in which it did not run."""


def measure_products(plan: Plan, part: CachePart, names: Callable[[str], bool], steps: int, sample: Sample) -> Products:
    """Products of the features that a cache reuses, between all steps.

    Of large features they are estimated from some of their values, drawn at random, the same ones in all steps.

    Args:
        plan: without the cache.
        part: the cache; it decides about the modules, and what is kept of them.
        names: which of its modules are looked at.
        steps: number of timesteps.
        sample: runs a plan.
    """
    watch = _Watch(part=part, names=names, steps=steps, found={})
    sample(plan.model_copy(update={"caches": (*plan.caches, watch)}))
    return dict(watch.found)


class _Watch(CachePart):
    """Runs everything and compares what the modules of another cache give at all steps."""

    type: Literal["products"] = "products"
    part: Any
    names: Any
    steps: int
    found: Any

    def reach(self, network: nn.Module) -> tuple[str, ...]:
        return tuple(self.part.reach(network))

    def computes(self, steps: int) -> None:
        return None

    def make(self, modules: Mapping[str, nn.Module], run: Run) -> CacheHook:
        chosen = {name: module for name, module in modules.items() if self.names(name)}
        residual = self.part.residual if isinstance(self.part, MaskPart) else lambda name: False
        return _Watching(chosen, frozenset(filter(residual, chosen)), self.steps, self.found)


class _Watching(FeatureHook):
    def __init__(
        self, modules: Mapping[str, nn.Module], residual: frozenset[str], steps: int, found: dict[str, list[Tensor]]
    ) -> None:
        super().__init__(modules, residual)
        self.steps, self.found = steps, found
        self.past: dict[tuple[str, int, str], tuple[Tensor, dict[int, Tensor]]] = {}

    def pass_module(self, passing: Passing) -> Any:
        evaluation = passing.evaluation
        place = (evaluation.component, evaluation.branch, self.place(passing))
        output = passing.run()
        if place not in self.past:
            nothing = torch.full((self.steps, self.steps), math.nan, dtype=torch.float64)
            self.past[place] = nothing, {}
            self.found.setdefault(passing.name, []).append(nothing)
        products, past = self.past[place]
        now = _looked_at(self.feature(passing, output), evaluation.rows)
        past[evaluation.index] = now
        for step, before in past.items():
            if before.shape == now.shape:
                product = float(torch.dot(before, now)) / evaluation.rows
                products[step, evaluation.index] = products[evaluation.index, step] = product
        return output


def _looked_at(feature: Any, rows: int) -> Tensor:
    """Values of a feature, float64 and flat, whose squares add up to about those of all."""
    found = []
    for leaf in tree_leaves(feature):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        values, most = leaf.detach().flatten(), LOOKED_AT * rows
        if len(values) > most:
            picks = torch.randint(len(values), (most,), generator=torch.Generator().manual_seed(0))
            values = values[picks.to(values.device)] * math.sqrt(len(values) / most)
        found.append(values.double().cpu())
    return torch.cat(found)


@dataclass(frozen=True)
class Costs:
    """What it costs to forecast one feature, or several at once.

    Attributes:
        products: as in `Products`; those of several features are listed together.
        factors: of each step, the squared error of the result for a squared error of 1.
    """

    products: Sequence[Tensor]
    factors: Sequence[float]
    _groups: tuple[tuple[frozenset[int], Tensor, list[list[float]]], ...] = field(init=False, repr=False)
    _known: dict[tuple[int, ...], float] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        sums: dict[frozenset[int], Tensor] = {}
        for table in self.products:
            ran = frozenset(torch.nonzero(torch.diagonal(table).isfinite()).flatten().tolist())
            sums[ran] = sums.get(ran, torch.zeros_like(table)) + torch.nan_to_num(table)
        groups = tuple((ran, table, table.tolist()) for ran, table in sums.items())
        object.__setattr__(self, "_groups", groups)

    @property
    def steps(self) -> int:
        """Number of timesteps."""
        return len(self.factors)

    def of(self, step: int, past: tuple[int, ...]) -> float:
        """The cost of a forecast in ``step`` from what was computed in the steps ``past``, newest first.

        Where a branch of guidance did not run in some of them it is made from the others.
        """
        key = (step, *past)
        if key not in self._known:
            self._known[key] = self.factors[step] * sum(
                _quadratic(table, step, [other for other in past if other in ran])
                for ran, _, table in self._groups
                if step in ran
            )
        return self._known[key]

    def apart(self, chosen: Sequence[int], order: int) -> float:
        """The costs of all steps but the ``chosen`` ones, added up."""
        return sum(self.of(step, past) for step, past in forecast_steps(chosen, self.steps, order))

    def together(self, chosen: Sequence[int], order: int) -> float:
        """The cost of all of them where the errors themselves add up, and so cancel where their signs differ."""
        steps = list(forecast_steps(chosen, self.steps, order))
        total = 0.0
        for ran, table, _ in self._groups:
            weights = [0.0] * self.steps
            for step, past in steps:
                known = [other for other in past if other in ran]
                if step in ran and known:
                    scale = math.sqrt(self.factors[step])
                    weights[step] += scale
                    for other, weight in zip(known, weights_at(known, step), strict=True):
                        weights[other] -= scale * weight
            vector = torch.tensor(weights, dtype=torch.float64)
            total += max(0.0, float(vector @ table @ vector))
        return total


def forecast_steps(chosen: Sequence[int], steps: int, order: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The steps that are not chosen, and before each of them the last ``order + 1`` chosen ones, newest first."""
    past: tuple[int, ...] = ()
    for step in range(steps):
        if step in chosen:
            past = (step, *past)[: order + 1]
        else:
            yield step, past


def _quadratic(table: list[list[float]], step: int, past: list[int]) -> float:
    """Squared error of the forecast in ``step``; a branch that has nothing to go on from computes."""
    if not past:
        return 0.0
    steps, weights = [step, *past], [-1.0, *weights_at(past, step)]
    terms = list(zip(steps, weights, strict=True))
    return max(0.0, sum(a * b * table[i][j] for i, a in terms for j, b in terms))


def measure_factors(
    plan: Plan, single: Callable[[int], CachePart], products: Products, steps: int, sample: Sample
) -> tuple[Tensor, tuple[float, ...]]:
    """Of each step, the squared error of the result for a squared error of 1 of all that is reused.

    Args:
        plan: without the cache.
        single: the cache that reuses in one step alone what was computed in the step before.
        products: from `measure_products`.
        steps: number of timesteps.
        sample: runs a plan.

    Returns:
        The samples of the plan, and the factors.

    Raises:
        InputError: when nothing changes from one step to the next.
    """
    plain = sample(plan)
    changes = Costs(every_one(products), (1.0,) * steps)
    count = min(PROBES, steps - 1)
    probes = sorted({round(1 + k * (steps - 2) / max(1, count - 1)) for k in range(count)})
    found: dict[int, float] = {}
    for step in probes:
        change = changes.of(step, (step - 1,))
        if change > 0:
            found[step] = squared_error(sample(with_cache(plan, single(step))), plain) / change
    if not found:
        raise InputError("the features of this pipeline do not change from step to step; there is nothing to calibrate")
    return plain, _interpolated(found, steps)


def every_one(products: Products) -> list[Tensor]:
    """The products of all modules."""
    return [table for tables in products.values() for table in tables]


def with_cache(plan: Plan, part: CachePart) -> Plan:
    """The plan with one cache more."""
    return plan.model_copy(update={"caches": (*plan.caches, part)})


def squared_error(samples: Tensor, plain: Tensor) -> float:
    """Mean squared difference of samples."""
    return float((samples - plain).double().square().mean())


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
