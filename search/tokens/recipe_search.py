"""The recipe of least cost within limits of accuracy, chosen on some questions and reported on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from ...samplers.errors import InputError
from ...samplers.provenance import Evidence
from ...samplers.tokens import EosExit, Quota, Recipe
from .candidates import Candidates, RecipeCandidate, Refused
from .journal import Answering, Journal
from .objective import TokenObjective
from .tally import Tally

REFERENCE = Recipe(name="one token a step", unmask=Quota(tokens=1), exit=EosExit())
"""LLaDA's loop over the whole canvas, with nothing decoded behind the end."""

AT_SEARCH = "at search"
"""What follows the names of quantities that were measured on the questions that the recipe was chosen on."""

Progress = Callable[[int, int, str], None]
"""Told the number of answers so far, about how many there will be, and what is measured."""

State = Literal["chosen", "complete", "limit", "waiting"]


def rungs_of(n: int) -> tuple[int, ...]:
    """Numbers of questions at which candidates are compared: a quarter, a half, all."""
    return tuple(dict.fromkeys((max(1, n // 4), max(1, n // 2), n)))


@dataclass(frozen=True)
class Trial:
    """A candidate as far as it was measured.

    Attributes:
        candidate: the recipe.
        tally: of its answers to the first questions.
        state: ``chosen``, ``complete`` when it answered all questions, ``limit`` when it was on the wrong side of a
            limit beyond the error before that, ``waiting`` when cheaper ones went on and one of them was chosen.
    """

    candidate: RecipeCandidate
    tally: Tally
    state: State


@dataclass(frozen=True)
class FoundRecipe:
    """The outcome of a search.

    Attributes:
        recipe: with its evidence.
        objective: what it was searched for.
        chosen: its trial.
        fresh: its answers to questions that nothing was chosen on.
        trials: of all candidates that ran, in their order.
        refused: what could not be made or run.
        merged: how many candidates were the same as others.
        seeds: of the questions that it was chosen on: the first, and one past the last.
        fresh_seeds: of the others.
        reference: the recipe that limits are multiples of; None where none is.
        reference_at_search: its answers to the questions of ``seeds``.
        reference_fresh: its answers to those of ``fresh_seeds``.
    """

    recipe: Recipe
    objective: TokenObjective
    chosen: Trial
    fresh: Tally
    trials: tuple[Trial, ...]
    refused: tuple[Refused, ...]
    merged: int
    seeds: tuple[int, int]
    fresh_seeds: tuple[int, int]
    reference: Recipe | None = None
    reference_at_search: Tally | None = None
    reference_fresh: Tally | None = None

    @property
    def holds(self) -> bool:
        """Whether the limits hold on fresh questions as well."""
        return self.objective.holds(self.fresh, self.reference_fresh)

    def excess(self, quantity: str) -> float:
        """What a quantity is on fresh questions, less what it was on those that the recipe was chosen on."""
        return self.fresh.estimate(quantity).value - self.chosen.tally.estimate(quantity).value

    def to_json(self) -> dict[str, Any]:
        """The table of the search, as JSON data."""
        return {
            "objective": self.objective.cost,
            "limits": [str(limit) for limit in self.objective.limits],
            "seeds": self.seeds,
            "fresh_seeds": self.fresh_seeds,
            "chosen": _row(self.chosen),
            "fresh": self.fresh.values(),
            "excess": {quantity: self.excess(quantity) for quantity in self.objective.quantities},
            "holds": self.holds,
            "reference": self.reference and self.reference.to_json(),
            "reference_at_search": self.reference_at_search and self.reference_at_search.values(),
            "reference_fresh": self.reference_fresh and self.reference_fresh.values(),
            "merged": self.merged,
            **_table(self.trials, self.refused),
        }


def _table(trials: Sequence[Trial], refused: Sequence[Refused]) -> dict[str, Any]:
    return {
        "trials": [_row(trial) for trial in trials],
        "refused": [{"changes": dict(each.changes), "reason": each.reason} for each in refused],
    }


def _row(trial: Trial) -> dict[str, Any]:
    return {
        "changes": dict(trial.candidate.changes),
        "state": trial.state,
        "questions": trial.tally.n,
        "values": trial.tally.values(),
        "tasks": {task: right / asked for task, (right, asked) in trial.tally.right.items()},
    }


def search_recipe(
    candidates: Candidates,
    objective: TokenObjective,
    answering: Answering,
    *,
    n: int,
    seed: int,
    reference: Recipe = REFERENCE,
    journal: Journal | None = None,
    progress: Progress = lambda done, total, note: None,
    command: str | None = None,
) -> FoundRecipe:
    """Chooses a recipe on n questions, and measures it on n others.

    All candidates answer the same questions, at first a quarter of them, then a half, then all. At each of these rungs
    those are dropped that are on the wrong side of a limit by more than `SURE` standard errors, and the cheaper half of
    the rest goes on. The cheapest one that keeps to the limits on all questions is chosen; where none of those that
    came so far does, the ones that were left behind take their turn. So something that keeps to the limits is found
    whenever there is one, except for one that was dropped.

    Args:
        candidates: what is chosen from.
        objective: the cost and the limits.
        answering: from a recipe and the seeds of questions to its answers; an answer depends on its recipe and its
            seed alone. An `InputError` refuses the candidate.
        n: questions to choose on, of seeds from ``seed`` on, and as many fresh ones, of the seeds after them.
        seed: of the first question.
        reference: what limits may be multiples of.
        journal: of what was measured before; nothing in it is measured again.
        progress: told how far it is.
        command: for the evidence.

    Raises:
        InputError: when no candidate runs, none keeps to the limits, or a multiple of the reference's accuracy is asked
            for and that is 0.
    """
    search = _Search(
        candidates.recipes,
        objective,
        answering,
        n,
        seed,
        reference if objective.needs_reference else None,
        journal or Journal(),
        progress,
    )
    search.check_reference()
    found = search.choose()
    trials = search.trials(found)
    if found is None:
        refused = (*candidates.refused, *search.refused)
        search.journal.conclude({"chosen": None, **_table(trials, refused)})
        raise search.nothing(trials)
    fresh_seeds = range(seed + n, seed + 2 * n)
    fresh = search.measure(found.recipe, fresh_seeds, "the chosen recipe on fresh questions")
    outcome = FoundRecipe(
        recipe=found.recipe,
        objective=objective,
        chosen=next(trial for trial in trials if trial.state == "chosen"),
        fresh=fresh,
        trials=trials,
        refused=(*candidates.refused, *search.refused),
        merged=candidates.merged,
        seeds=(seed, seed + n),
        fresh_seeds=(fresh_seeds.start, fresh_seeds.stop),
        reference=search.reference,
        reference_at_search=search.of_reference(n),
        reference_fresh=search.of_reference(n, fresh=True),
    )
    search.journal.conclude(outcome.to_json())
    return replace(outcome, recipe=found.recipe.replace(evidence=_evidence(outcome, command)))


def _evidence(found: FoundRecipe, command: str | None) -> tuple[Evidence, ...]:
    """Every quantity on fresh questions, then on those that the recipe was chosen on."""
    relative = {found.objective.cost} | {limit.quantity for limit in found.objective.limits if limit.relative}
    entries = []
    for suffix, tally, reference, seeds in (
        ("", found.fresh, found.reference_fresh, found.fresh_seeds),
        (f" {AT_SEARCH}", found.chosen.tally, found.reference_at_search, found.seeds),
    ):
        for quantity in found.objective.quantities:
            estimate, against = tally.estimate(quantity), None
            if quantity in relative and found.reference is not None and reference is not None:
                name = found.reference.name or "the reference"
                against = f"{name}, which has {reference.estimate(quantity).value:.4g}"
            entries.append(
                Evidence(
                    metric=quantity + suffix,
                    value=estimate.value,
                    se=estimate.se,
                    n=estimate.n,
                    seeds=seeds,
                    against=against,
                    command=command,
                )
            )
    return tuple(entries)


@dataclass
class _Search:
    """The state of one search."""

    candidates: Sequence[RecipeCandidate]
    objective: TokenObjective
    answering: Answering
    n: int
    seed: int
    reference: Recipe | None
    journal: Journal
    progress: Progress
    parts: dict[tuple[Recipe, range], Tally] = field(default_factory=dict)
    broken: set[Recipe] = field(default_factory=set)
    refused: list[Refused] = field(default_factory=list)
    done: int = 0

    @cached_property
    def total(self) -> int:
        """About how many answers there will be: as if half of the candidates went on at each rung, and once."""
        count, total = len(self.candidates), self.n
        for before, after in pairwise((0, *rungs_of(self.n))):
            total += count * (after - before)
            count = -(-count // 2)
        return total + (0 if self.reference is None else 2 * self.n)

    def measure(self, recipe: Recipe, seeds: range, note: str) -> Tally:
        """Of answers to the questions of some seeds."""
        if (recipe, seeds) not in self.parts:
            self.progress(min(self.done, self.total), self.total, note)
            self.parts[recipe, seeds] = self.journal.tally(recipe, seeds, self.answering)
            self.done += len(seeds)
            self.progress(min(self.done, self.total), self.total, note)
        return self.parts[recipe, seeds]

    def spans(self, count: int, first: int) -> list[range]:
        """The seeds of the first ``count`` questions, rung by rung."""
        rungs = (0, *(rung for rung in rungs_of(self.n) if rung <= count))
        return [range(first + before, first + after) for before, after in pairwise(rungs)]

    def first(self, recipe: Recipe, count: int, note: str) -> Tally:
        """Of answers to the first questions."""
        return _sum([self.measure(recipe, span, note) for span in self.spans(count, self.seed)])

    def of_reference(self, count: int, fresh: bool = False) -> Tally | None:
        """The reference's answers to the first questions."""
        if self.reference is None:
            return None
        spans = self.spans(count, self.seed + self.n if fresh else self.seed)
        return _sum([self.measure(self.reference, span, "the reference") for span in spans])

    def check_reference(self) -> None:
        """Raises ``InputError`` for a limit that anything keeps to because the reference answers nothing right."""
        reference = self.of_reference(self.n)
        for limit in self.objective.limits:
            if limit.relative and limit.bound(reference) == 0:
                raise InputError(
                    f"the limit {limit} asks for nothing, the reference's {limit.quantity} is 0 on {self.n} questions; "
                    "give another reference, or a number"
                )

    def choose(self) -> RecipeCandidate | None:
        """The cheapest candidate that keeps to the limits on all questions, if there is one."""
        field = list(self.candidates)
        while field:
            behind: list[RecipeCandidate] = []
            for count in rungs_of(self.n):
                passed = [(candidate, self._passed(candidate, count)) for candidate in field]
                going = sorted(((self._rank(tally), each) for each, tally in passed if tally), key=lambda one: one[0])
                half = len(going) if count == self.n else -(-len(going) // 2)
                field = [each for _, each in going[:half]]
                behind += [each for _, each in going[half:]]
            reference = self.of_reference(self.n) if field else None
            for candidate in field:
                if self.objective.holds(self.first(candidate.recipe, self.n, candidate.title), reference):
                    return candidate
            field = behind
        return None

    def _rank(self, tally: Tally) -> tuple[float, float]:
        """Cost, and among equals the accuracy."""
        return tally.estimate(self.objective.cost).value, -tally.estimate("worst_accuracy").value

    def _passed(self, candidate: RecipeCandidate, count: int) -> Tally | None:
        """A candidate's answers to the first questions; None when it does not run, or is beyond a limit."""
        try:
            tally = self.first(candidate.recipe, count, candidate.title)
        except InputError as error:
            self.refused.append(Refused(candidate.changes, str(error)))
            return None
        if self.objective.could_hold(tally, self.of_reference(count)):
            return tally
        self.broken.add(candidate.recipe)
        return None

    def trials(self, found: RecipeCandidate | None) -> tuple[Trial, ...]:
        """What was measured of each candidate that ran."""
        trials = []
        for candidate in self.candidates:
            known = [(candidate.recipe, span) for span in self.spans(self.n, self.seed)]
            tallies = [self.parts[each] for each in known if each in self.parts]
            if tallies:
                tally = _sum(tallies)
                trials.append(Trial(candidate, tally, self._state(candidate, tally, found)))
        return tuple(trials)

    def _state(self, candidate: RecipeCandidate, tally: Tally, found: RecipeCandidate | None) -> State:
        if candidate is found:
            return "chosen"
        if candidate.recipe in self.broken:
            return "limit"
        return "complete" if tally.n == self.n else "waiting"

    def nothing(self, trials: Sequence[Trial]) -> InputError:
        """The error of a search in which no candidate keeps to the limits; names the nearest one."""
        if not trials:
            one = self.refused[0]
            return InputError(f"none of {len(self.refused)} candidates ran; {one.title}: {one.reason}")

        def worst(trial: Trial) -> tuple[float, str]:
            """The limit that is missed by the largest share of itself, in words."""
            reference = self.of_reference(trial.tally.n)
            missed = []
            for limit in self.objective.limits:
                estimate, bound = trial.tally.estimate(limit.quantity), limit.bound(reference)
                shown = f"{limit.quantity} {estimate.value:.4g} +- {estimate.se:.2g} where {limit} asks for {bound:.4g}"
                missed.append((limit.slack(trial.tally, reference).value / bound, shown))
            return min(missed)

        nearest = max(trials, key=lambda trial: worst(trial)[0])
        cost = nearest.tally.estimate(self.objective.cost)
        return InputError(
            f"none of {len(trials)} candidates kept to the limits {', '.join(map(str, self.objective.limits))}; the "
            f"nearest, {nearest.candidate.title}, has {worst(nearest)[1]} ({nearest.tally.n} questions, "
            f"{self.objective.cost} {cost.value:.4g}); relax the limits, or vary something else"
        )


def _sum(tallies: Sequence[Tally]) -> Tally:
    return sum(tallies[1:], tallies[0])
