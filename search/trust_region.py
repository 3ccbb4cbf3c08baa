"""Gaussian processes in a trust region, as a sampler of optuna, after TuRBO (Eriksson et al., arXiv:1910.01739).

Most of a space of plans is useless: steps that crowd at one end give distances a hundred times those of a good plan.
A Gaussian process over all of it spends its trials there. So it is fitted to, and proposes in, a box about the best
plan so far, which grows while proposals are better than it and shrinks while they are not; and losses are compressed,
so that a bad trial is bad and no more. All of it is derived from the finished trials, so a search that was stopped
goes on as if it had not been.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from ..samplers import InputError
from .claims import FINISHED
from .proposals import Constraints
from .study_storage import quiet

FROM = "trust:from"
"System attribute of a trial: which of the finished trials its box was about."

Rank = tuple[int, float]
"""Whether a trial breaks limits, or has no value (2), and what is less for a better one."""


@dataclass(frozen=True)
class TrustRegion:
    """The numbers of the search.

    Attributes:
        first: half the side of the first box, as a share of a parameter's range.
        least: it does not shrink below.
        grow_after: successes in a row after which it doubles, up to half the range.
        shrink_after: failures in a row after which it halves.
        switch: share of the trials that keep the best plan and change one choice that has no order.
        enough: trials in the box that a Gaussian process is fitted to; with fewer, plans are drawn in the box.
    """

    first: float = 0.15
    least: float = 0.01
    grow_after: int = 2
    shrink_after: int = 5
    switch: float = 0.1
    enough: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.first <= 0.5:
            raise InputError(f"half a side is above 0 and at most 0.5; got first {self.first}, least {self.least}")
        if min(self.grow_after, self.shrink_after, self.enough) < 1 or not 0 <= self.switch < 1:
            raise InputError(
                f"counts are at least 1 and the share of switches is in 0 to 1; got grow_after {self.grow_after}, "
                f"shrink_after {self.shrink_after}, enough {self.enough}, switch {self.switch}"
            )


class TrustRegionSampler(BaseSampler):
    """Proposes by Gaussian processes in a box about the best trial; the first trials are starts, or random.

    Args:
        seed: of the proposals.
        setting: the numbers of the search.
        constraints: violations of a trial, at most 0 where it keeps to the limits; such trials come first.
    """

    def __init__(self, seed: int, setting: TrustRegion | None = None, constraints: Constraints | None = None) -> None:
        self._seed = seed
        self._random = random.Random(seed)
        self._setting = setting or TrustRegion()
        self._constraints = constraints
        self._independent = RandomSampler(seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that all complete trials have."""
        return intersection_search_space(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A plan in the box; nothing before there is a trial to put it about."""
        if len(study.directions) > 1:
            raise InputError("a trust region has one objective; take nsga2 for two")
        trials = study.get_trials(deepcopy=False, states=FINISHED)
        ranks = [self._rank(study, each) for each in trials]
        if not search_space or min(ranks, default=(2, 0.0))[0] == 2:
            return {}
        best = ranks.index(min(ranks))
        study._storage.set_trial_system_attr(trial._trial_id, FROM, best)
        centre = {name: trials[best].params[name] for name in search_space}
        choices = [name for name, where in search_space.items() if _choices(where)]
        if choices and self._random.random() < self._setting.switch:
            name = self._random.choice(choices)
            return centre | {name: self._random.choice([c for c in _choices(search_space[name]) if c != centre[name]])}
        box = _box(search_space, centre, self._half(trials, ranks))
        inside = [
            (each, rank)
            for each, rank in zip(trials, ranks, strict=True)
            if rank[0] < 2 and all(name in each.params and _within(each.params[name], box[name]) for name in box)
        ]
        if len(inside) < self._setting.enough:
            return centre | {name: self._drawn(where) for name, where in box.items() if self._random.random() < 0.5}
        return self._proposed(inside, box)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def _rank(self, study: Study, trial: FrozenTrial) -> Rank:
        if trial.state != TrialState.COMPLETE:
            return 2, 0.0
        value = trial.values[0] if study.direction == StudyDirection.MINIMIZE else -trial.values[0]
        broken = sum(max(0.0, each) for each in self._constraints(trial)) if self._constraints else 0.0
        return (1, broken) if broken > 0 else (0, value)

    def _half(self, trials: Sequence[FrozenTrial], ranks: Sequence[Rank]) -> float:
        """Half a side of the box."""
        half, row = self._setting.first, 0
        for rank, trial in zip(ranks, trials, strict=True):
            parent = trial.system_attrs.get(FROM)
            if parent is None:
                continue
            better = rank < ranks[parent]
            row = max(row, 0) + 1 if better else min(row, 0) - 1
            if row == self._setting.grow_after:
                half, row = min(2 * half, 0.5), 0
            elif row == -self._setting.shrink_after:
                half, row = max(half / 2, self._setting.least), 0
        return half

    def _drawn(self, where: BaseDistribution) -> Any:
        if isinstance(where, IntDistribution):
            return self._random.randint(where.low, where.high)
        if isinstance(where, FloatDistribution):
            return self._random.uniform(where.low, where.high)
        return _only(where)

    def _proposed(
        self, inside: Sequence[tuple[FrozenTrial, Rank]], box: Mapping[str, BaseDistribution]
    ) -> dict[str, Any]:
        """What a Gaussian process on the trials in the box expects most of."""
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            sampler = GPSampler(seed=self._seed, n_startup_trials=0)
            mirror = optuna.create_study(sampler=sampler)
        for (trial, _), value in zip(inside, compressed([rank for _, rank in inside]), strict=True):
            params = {name: trial.params[name] for name in box}
            mirror.add_trial(create_trial(params=params, distributions=dict(box), value=value))
        return dict(mirror.ask(dict(box)).params)


def compressed(ranks: Sequence[Rank]) -> list[float]:
    """Values in the order of the ranks: the logarithm of 1 + the distance to the best in units of the median's.

    Trials that break limits come after all that do not, by how much they break them.
    """
    kept = [value for broken, value in ranks if broken == 0]
    if not kept:
        return [value for _, value in ranks]
    least = min(kept)
    unit = median(kept) - least or 1.0
    worst = math.log1p((max(kept) - least) / unit)
    return [math.log1p((value - least) / unit) if broken == 0 else worst + 1 + value for broken, value in ranks]


def _box(space: Mapping[str, BaseDistribution], centre: Mapping[str, Any], half: float) -> dict[str, BaseDistribution]:
    """The distributions cut to a box; one choice is left of those that have no order."""
    found: dict[str, BaseDistribution] = {}
    for name, where in space.items():
        if isinstance(where, IntDistribution):
            steps = max(1, round(half * (where.high - where.low)))
            found[name] = IntDistribution(
                max(where.low, centre[name] - steps), min(where.high, centre[name] + steps), step=where.step
            )
        elif isinstance(where, FloatDistribution):
            reach = half * (where.high - where.low)
            found[name] = FloatDistribution(max(where.low, centre[name] - reach), min(where.high, centre[name] + reach))
        else:
            found[name] = CategoricalDistribution((centre[name],))
    return found


def _choices(where: BaseDistribution) -> tuple[Any, ...]:
    """The values of a choice that has no order and more than one of them."""
    found = where.choices if isinstance(where, CategoricalDistribution) else ()
    return tuple(found) if len(found) > 1 else ()


def _only(where: BaseDistribution) -> Any:
    assert isinstance(where, CategoricalDistribution)
    return where.choices[0]


def _within(value: Any, where: BaseDistribution) -> bool:
    if isinstance(where, IntDistribution | FloatDistribution):
        return bool(where.low <= value <= where.high)
    return bool(value == _only(where))
