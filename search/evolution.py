"""AutoDiffusion's evolutionary search of steps and layers (arXiv:2309.10438), as a sampler of optuna.

A candidate is a sequence of distinct train times, and for each step the layers that are skipped in it. The genes are
the parameters ``grid-index.{step}`` and ``layers.{step}.{module}``; parameters of other axes evolve beside them, each
as a gene of its own. Of the two stages the first searches the times with the whole network; in the second the share
of skipped layers grows from epoch to epoch (`skip_range`).

The numbers are those of the paper, and of the released code where the paper gives none. What is done otherwise,
because the release does not do what it says:

* A mutated layer is another layer. The release compares there instead of assigning, so its layers never mutate.
* A crossover has as many steps as its parents. The release compares the lists of times where it means their lengths,
  and appends steps of one parent by chance.
* A crossover that takes one time from both parents repairs it; the release loses a step.
* Candidates are sorted, and what a step skips stays with its time. The release sorts the times while it samples but
  not the skipped layers beside them, and evaluates permutations of one sequence as different candidates.
* Skipped layers are counted over the whole sequence, so that a share below one layer of a step means something.
* Two uniform sequences start the search, diffusers' leading and trailing one; the release has the leading one.
* The number of steps is fixed. The release gives what skipped layers save to further steps, up to a total of layers.

Its other defects do not arise here: one feature network and the same noise serve all candidates, every measurement has
an error, and the sampler keeps nothing of its own, so that a search that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ..samplers import InputError
from .claims import FINISHED
from .genes import LAYERS, TIMES, Candidate, Genes, off_and_on, uniform_times, values
from .proposals import Constraints

TRIES = 100
"Draws of one kind before a candidate is drawn at random, when all were evaluated before."

Name = TypeVar("Name", int, str)

Anew = Callable[[str], Any]
"""From the name of a parameter to a random value of it."""


@dataclass(frozen=True)
class Evolution:
    """The numbers of the search.

    Attributes:
        population: candidates of an epoch, at least 2.
        epochs: how many follow the first one.
        parents: the best candidates so far, which the next epoch descends from; at least 2.
        mutants: candidates of an epoch that are a parent with some genes changed.
        crossovers: candidates of an epoch that take each step from one of two parents. The rest are random.
        mutation: probability that a gene of a mutant changes, in (0, 1].
        first_mutation: the same in the first epoch, whose mutants descend from the uniform sequences.
        max_skipped: the largest share of layers that is skipped, reached in five epochs; in [0, 1].
        min_skipped: the least share in late epochs, at most max_skipped. The release's default is 0.
    """

    population: int = 50
    epochs: int = 14
    parents: int = 10
    mutants: int = 25
    crossovers: int = 15
    mutation: float = 0.25
    first_mutation: float = 0.1
    max_skipped: float = 0.1
    min_skipped: float = 0.0

    def __post_init__(self) -> None:
        if self.population < 2 or self.parents < 2 or self.epochs < 0:
            raise InputError(f"an evolution has a population and parents of at least 2, and epochs from 0; got {self}")
        if min(self.mutants, self.crossovers) < 0 or self.mutants + self.crossovers > self.population:
            raise InputError(f"mutants and crossovers are at most the population together; got {self}")
        if not (0 < self.mutation <= 1 and 0 < self.first_mutation <= 1):
            raise InputError(f"a mutation is a probability above 0, up to 1; got {self}")
        if not 0 <= self.min_skipped <= self.max_skipped <= 1:
            raise InputError(f"shares of skipped layers are 0 <= min_skipped <= max_skipped <= 1; got {self}")

    @property
    def trials(self) -> int:
        """Candidates of the whole search."""
        return self.population * (1 + self.epochs)


class EvolutionSampler(BaseSampler):
    """Suggests the candidates of the evolutionary search.

    All it knows are the study's finished trials in order, pruned ones included, which rank last; a trial that breaks
    a constraint ranks below one that does not. The same trials and seed give the same candidate, and a candidate that
    runs at the same time another.

    Args:
        steps: steps of the sequence, at least 1.
        seed: of what is drawn.
        setting: the numbers of the search.
        constraints: by how much a trial breaks each limit; up to 0 where it holds.

    Raises:
        InputError: for less than 1 step; when asked for a candidate, for more than one objective, or parameters that
            do not choose ``steps`` times.
    """

    def __init__(
        self, steps: int, seed: int, setting: Evolution | None = None, constraints: Constraints | None = None
    ) -> None:
        if steps < 1:
            raise InputError(f"evolution searches sequences of at least 1 step; got {steps}")
        self.steps, self.seed, self.setting = steps, seed, setting or Evolution()
        self.constraints = constraints

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What the finished trials have in common, as the last one has it; nothing before the first one."""
        found = [one.distributions for one in _finished(study)]
        return {name: found[-1][name] for name in sorted(set(found[0]).intersection(*found))} if found else {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next candidate."""
        if len(study.directions) != 1:
            raise InputError(
                f"evolution searches one objective and the study has {len(study.directions)}; take another sampler"
            )
        if not search_space:
            return {}
        history = _finished(study)
        sign = 1.0 if study.directions[0] == StudyDirection.MINIMIZE else -1.0
        ranks = [_rank(trial, sign, self.constraints) for trial in history]
        running = [
            one
            for one in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if one.params.keys() >= search_space.keys()
        ]
        draw = random.Random(f"{self.seed}/{len(history)}/{len(running)}")
        uniform_draws = RandomSampler(draw.getrandbits(32))

        def anew(name: str) -> Any:
            return uniform_draws.sample_independent(study, trial, name, search_space[name])

        breed = Breed(Genes.of(search_space, self.steps), self.setting, draw, anew)
        past, begun = ([breed.genes.read(one.params) for one in trials] for trials in (history, running))
        return breed.genes.write(breed.next(past, ranks, begun))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A gene of the first candidate: the leading sequence with the whole network; others are random."""
        if param_name.startswith(TIMES):
            leading, place = uniform_times(values(param_distribution), self.steps)[0], param_name.removeprefix(TIMES)
            return leading[min(int(place), self.steps - 1)]
        if param_name.startswith(LAYERS):
            return off_and_on(param_distribution)[0]
        draws = RandomSampler(random.Random(f"{self.seed}/{param_name}").getrandbits(32))
        return draws.sample_independent(study, trial, param_name, param_distribution)


@dataclass(frozen=True)
class Breed:
    """Makes candidates.

    Attributes:
        genes: how they are spelt.
        setting: the numbers of the search.
        draw: where chance comes from.
        anew: draws one of the other parameters.
    """

    genes: Genes
    setting: Evolution
    draw: random.Random
    anew: Anew

    def next(
        self, past: Sequence[Candidate], ranks: Sequence[tuple[float, ...]], begun: Sequence[Candidate] = ()
    ) -> Candidate:
        """The candidate that follows those of the past, and is none of them while there are others.

        Args:
            past: at least one, in order.
            ranks: of each, the least for the best.
            begun: others that need not come again.
        """
        setting, seen = self.setting, {*past, *begun}
        epoch, place = divmod(len(past), setting.population)
        if epoch == 0:
            parents = [replace(past[0], times=times, skipped=self._none()) for times in self._uniform_times()]
            for candidate in parents:
                if candidate not in seen:
                    return candidate
        else:
            best_first = sorted(range(epoch * setting.population), key=lambda k: (ranks[k], k))
            parents = list(dict.fromkeys(past[k] for k in best_first))[: setting.parents]
        ends = [setting.population * (k + 1) for k in range(epoch)]
        share = skip_range([min(range(end), key=lambda k: (ranks[k], k)) for end in ends], setting)
        kind = self._kind(epoch, place, parents, share)
        candidate = kind()
        for attempt in range(2 * TRIES):
            if candidate not in seen:
                break
            candidate = kind() if attempt < TRIES else self.random(share)
        return candidate

    def _kind(
        self, epoch: int, place: int, parents: Sequence[Candidate], share: tuple[float, float]
    ) -> Callable[[], Candidate]:
        """What makes the candidate of a place in an epoch. The first one has random ones and then mutants."""
        setting = self.setting
        if epoch == 0 and place > setting.population // 2:
            return lambda: self.mutant(self.draw.choice(parents), setting.first_mutation, share)
        if epoch and (place < setting.mutants or len(parents) < 2):
            return lambda: self.mutant(self.draw.choice(parents), setting.mutation, share)
        if epoch and place < setting.mutants + setting.crossovers:
            return lambda: self.crossover(*self._pair(parents), share)
        return lambda: self.random(share)

    def random(self, share: tuple[float, float]) -> Candidate:
        """Any candidate whose share of skipped layers is in a range."""
        times = self.draw.sample(self.genes.times, self.genes.steps) if self.genes.times else []
        skipped = [self._drawn(modules, share) for modules in self.genes.modules]
        return self._finish(times, skipped, [self.anew(name) for name in self.genes.others], share)

    def mutant(self, parent: Candidate, probability: float, share: tuple[float, float]) -> Candidate:
        """A parent whose genes each changed with a probability: a time to an unused one, a skipped layer to another.

        A step that skips nothing begins to with that probability.
        """
        unused = self._some(set(self.genes.times) - {*parent.times}, len(parent.times))
        times = [unused.pop() if self._chance(probability) and unused else time for time in parent.times]
        skipped = [
            self._moved(skips, modules, probability, share)
            for skips, modules in zip(parent.skipped, self.genes.modules, strict=True)
        ]
        others = [
            self._changed(name, value) if name not in self.genes.fixed and self._chance(probability) else value
            for name, value in zip(self.genes.others, parent.others, strict=True)
        ]
        return self._finish(self._distinct(times, set()), skipped, others, share)

    def crossover(self, first: Candidate, second: Candidate, share: tuple[float, float]) -> Candidate:
        """Each step, its time with its skipped layers, and each other parameter from one of two parents."""
        sides = [self._chance(0.5) for _ in range(max(len(first.times), len(first.skipped)))]
        times = [(first if side else second).times[k] for k, side in enumerate(sides)] if first.times else []
        skipped = [(first if side else second).skipped[k] for k, side in enumerate(sides)] if first.skipped else []
        others = [one if self._chance(0.5) else two for one, two in zip(first.others, second.others, strict=True)]
        return self._finish(self._distinct(times, {*first.times, *second.times}), skipped, others, share)

    def _finish(
        self, times: Sequence[int], skipped: Sequence[frozenset[str]], others: Sequence[Any], share: tuple[float, float]
    ) -> Candidate:
        """The candidate in order, with layers skipped or no longer skipped by chance until their share is in range."""
        candidate = self.genes.ordered(times, skipped, tuple(others))
        genes = [(k, module) for k, modules in enumerate(self.genes.modules) for module in sorted(modules)]
        on = [(k, module) for k, module in genes if module in candidate.skipped[k]]
        least, most = math.ceil(share[0] * len(genes) - 1e-9), math.floor(share[1] * len(genes) + 1e-9)
        if len(on) > most:
            on = self.draw.sample(on, most)
        elif len(on) < least:
            on += self.draw.sample([gene for gene in genes if gene not in on], min(least, most) - len(on))
        steps = range(len(self.genes.modules))
        return replace(candidate, skipped=tuple(frozenset(m for k, m in on if k == step) for step in steps))

    def _distinct(self, times: Sequence[int], preferred: set[int]) -> list[int]:
        """The times with unused ones for those that were there before, of the preferred ones while there are."""
        rest, found = set(self.genes.times) - {*times}, list[int]()
        unused = self._some(rest - preferred, len(times)) + self._some(rest & preferred, len(times))
        for time in times:
            found.append(unused.pop() if time in found else time)
        return found

    def _drawn(self, modules: frozenset[str], share: tuple[float, float]) -> frozenset[str]:
        """A random set of a step's modules; its share is uniform in a range, rounded by chance."""
        count = math.floor(self.draw.uniform(*share) * len(modules) + self.draw.random())
        return frozenset(self.draw.sample(sorted(modules), min(count, len(modules))))

    def _moved(
        self, skips: frozenset[str], modules: frozenset[str], probability: float, share: tuple[float, float]
    ) -> frozenset[str]:
        """What a step of a mutant skips."""
        if not skips:
            return self._drawn(modules, share) if self._chance(probability) else skips
        spare = self._some(modules - skips, len(skips))
        return frozenset(spare.pop() if self._chance(probability) and spare else module for module in sorted(skips))

    def _changed(self, name: str, value: Any) -> Any:
        """Another value of a parameter."""
        found = value
        while found == value:
            found = self.anew(name)
        return found

    def _some(self, things: Set[Name], count: int) -> list[Name]:
        """As many of the things, or all, in an order of chance that the set's own order has no part in."""
        return self.draw.sample(sorted(things), min(count, len(things)))

    def _chance(self, probability: float) -> bool:
        return self.draw.random() < probability

    def _pair(self, parents: Sequence[Candidate]) -> tuple[Candidate, Candidate]:
        first, second = self.draw.sample(parents, 2)
        return first, second

    def _none(self) -> tuple[frozenset[str], ...]:
        return (frozenset(),) * len(self.genes.modules)

    def _uniform_times(self) -> list[tuple[int, ...]]:
        return uniform_times(self.genes.times, self.genes.steps)


def skip_range(best: Sequence[int], setting: Evolution) -> tuple[float, float]:
    """The least and the largest share of skipped layers of the next epoch.

    Both are 0 in the first stage, which ends with the first epoch that does not change the best candidate, or with
    the sixth. The largest share then is a fifth of ``max_skipped``, and a fifth more after each epoch; the least one
    is ``min_skipped`` after the seventh, or the largest if that is less. (So the released code; its text says five.)

    Args:
        best: after each finished epoch, what tells the best candidate so far apart.
        setting: the numbers of the search.
    """
    fifths = 0
    for epoch, candidate in enumerate(best):
        if fifths or epoch > 4 or (epoch > 0 and candidate == best[epoch - 1]):
            fifths = min(fifths + 1, 5)
    largest = setting.max_skipped * fifths / 5
    return min(setting.min_skipped if len(best) > 6 else 0.0, largest), largest


def _finished(study: Study) -> list[FrozenTrial]:
    """The study's finished trials that tell something, in order."""
    return [trial for trial in study.get_trials(deepcopy=False, states=FINISHED) if trial.params]


def _rank(trial: FrozenTrial, sign: float, constraints: Constraints | None) -> tuple[float, ...]:
    """The least for the best: complete trials by their value, then pruned ones by how far they came."""
    broken = sum(max(0.0, amount) for amount in constraints(trial)) if constraints is not None else 0.0
    if trial.state == TrialState.COMPLETE:
        return 0, broken, 0, sign * trial.values[0]
    last = max(trial.intermediate_values, default=0)
    return 1, broken, -last, sign * trial.intermediate_values.get(last, 0.0)
