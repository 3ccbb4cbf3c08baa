"""What to measure next: a plan that a sampler suggests and that no trial has yet.

The sampler sees a copy of the study in memory that holds the finished trials, numbered without gaps, and those that
other workers are at; not the trials of workers that died. So what it suggests depends on the finished trials and its
seed alone, and what it suggests twice leaves no trace in the study.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from ..samplers import Plan
from .space import Parameters, Space, plan_key
from .study_storage import quiet

SUGGESTED = 32
"Suggestions of the sampler, all of them known plans, after which plans are drawn at random."

DRAWN = 200
"Random plans, all of them known, after which the space counts as used up."

MakeSampler = Callable[[int], BaseSampler]
"From a seed to a sampler."

Constraints = Callable[[FrozenTrial], Sequence[float]]
"From a trial to what it violates, at most 0 for each limit that it keeps to."


@dataclass(frozen=True)
class Proposal:
    """A plan to measure, and what its trial is made of."""

    plan: Plan
    key: str
    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    system_attrs: Mapping[str, Any]


@dataclass(frozen=True)
class Proposer:
    """Proposes plans of a space.

    Attributes:
        space: all plans.
        sampler: makes a sampler from a seed.
        seed: of the search.
        directions: ``minimize`` or ``maximize`` for each objective.
        starts: parameters that come first, in order.
    """

    space: Space
    sampler: MakeSampler
    seed: int
    directions: Sequence[str]
    starts: Sequence[Parameters]

    def propose(
        self, finished: Sequence[FrozenTrial], running: Sequence[FrozenTrial], known: Collection[str]
    ) -> Proposal | None:
        """The next plan that is not known; None when the space seems to be used up.

        Args:
            finished: trials that the sampler learns from.
            running: trials without values yet.
            known: keys of plans not to propose.
        """
        seed = int(np.random.SeedSequence((self.seed, len(finished), len(running))).generate_state(1)[0])
        with quiet():
            mirror = optuna.create_study(
                storage=InMemoryStorage(),
                sampler=self.sampler(seed),
                directions=[StudyDirection[direction.upper()] for direction in self.directions],
            )
        mirror.add_trials([*finished, *running])
        for start in self.starts:
            if plan_key(self.space.plan(start)) not in known:
                mirror.enqueue_trial(dict(start))
                return self._suggestion(mirror)
        for _ in range(SUGGESTED):
            proposal = self._suggestion(mirror)
            if proposal.key not in known:
                return proposal
        mirror.sampler = RandomSampler(seed)
        for _ in range(DRAWN):
            proposal = self._suggestion(mirror)
            if proposal.key not in known:
                return proposal
        return None

    def _suggestion(self, mirror: optuna.Study) -> Proposal:
        trial = mirror.ask()
        plan = self.space.suggest(trial)
        by_sampler = mirror.get_trials(deepcopy=False)[trial.number].system_attrs
        return Proposal(plan, plan_key(plan), trial.params, trial.distributions, by_sampler)
