"""Rounds after the search: plans on samples that nothing was chosen on, each measured once and kept in the study."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from optuna.study import Study

from ..eval.jackknife import Estimate, Jackknife, paired_difference
from ..samplers import InputError, Plan
from .found import Scored
from .measure import CandidateError, Measured, Measurer
from .objective import Objective
from .space import plan_key

ROWS = "rows of rounds"
"User attribute of a study: network rows that its rounds took, in all sittings."


@dataclass(frozen=True)
class Round:
    """Plans on one set of samples; a search that was stopped does not measure them again.

    Attributes:
        study: where the numbers are kept.
        objective: what is measured.
        measurer: measures on the samples of this round.
        first: number of its first sample.
        n: how many there are.
    """

    study: Study
    objective: Objective
    measurer: Measurer
    first: int
    n: int

    def measure(self, plan: Plan) -> Measured:
        """A plan on the samples of the round.

        Raises:
            InputError: when it does not run.
        """
        name = f"round {self.first} {self.n} {hashlib.sha256(plan_key(plan).encode()).hexdigest()[:16]}"
        kept = self.study.user_attrs.get(name)
        if kept is None:
            try:
                with self._counted():
                    kept = written(self.measurer.measure(plan, self.n))
            except CandidateError as error:
                raise InputError(f"{plan.name or 'a plan'} cannot be measured: {error.reason}") from error
            self.study.set_user_attr(name, kept)
        return read(kept, plan)

    def holds(self, measured: Measured) -> bool:
        """Whether a plan keeps to all limits on these samples."""
        with self._counted():
            return all(violation <= 0 for violation in violations(self.objective, measured, self.measurer))

    def gap(self, plan: Plan, best: Plan, quality: str) -> Estimate | None:
        """A quality of a plan less that of the best one, paired; None for one that has no replicates."""
        ours, theirs = (self.measure(each).values[quality] for each in (plan, best))
        if isinstance(ours, Jackknife) and isinstance(theirs, Jackknife):
            pair = paired_difference(ours, theirs)
            return Estimate(pair.value, pair.se, pair.n)
        return None

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Adds to the study what the measurer spends in the block."""
        before = self.measurer.spent
        try:
            yield
        finally:
            rows = self.measurer.spent - before
            if rows:
                self.study.set_user_attr(ROWS, self.study.user_attrs.get(ROWS, 0) + rows)


def violations(objective: Objective, measured: Measured, measurer: Measurer) -> tuple[float, ...]:
    """By how much a plan breaks each limit, 0 or less where it keeps to it."""
    relative = any(limit.relative for limit in objective.limits)
    return objective.violations(measured, measurer.measure_teacher(measured.n) if relative else None)


def scored(measured: Measured, quality: str) -> Scored:
    """A measurement as a found search shows it."""
    others = {name: plain(value) for name, value in measured.values.items() if name != quality}
    return Scored(measured.n, plain(measured.values[quality]), others, dict(measured.costs))


def plain(value: Estimate) -> Estimate:
    """An estimate without its replicates."""
    return Estimate(value.value, value.se, value.n)


def written(measured: Measured) -> dict[str, Any]:
    """A measurement as JSON data, replicates included."""
    values = {name: asdict(value) for name, value in measured.values.items()}
    return {"n": measured.n, "values": values, "costs": dict(measured.costs)}


def read(data: Mapping[str, Any], plan: Plan) -> Measured:
    """The measurement of a plan in JSON data."""
    values = {
        name: Jackknife(**value | {key: tuple(value[key]) for key in ("replicates", "sizes")})
        if "replicates" in value
        else Estimate(**value)
        for name, value in data["values"].items()
    }
    return Measured(plan, data["n"], values, data["costs"])
