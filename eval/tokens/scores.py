"""Shares of right answers by task, with errors, and their differences on the same questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from ..record import Difference, Metric
from .accuracy import Accuracy, accuracy_of

WORST, MEAN, TASK = "worst_accuracy", "mean_accuracy", "accuracy_"
"Metrics; the last one is followed by the name of a task."


class Judged(Protocol):
    """An answer to a task that is right or wrong."""

    @property
    def task(self) -> str: ...

    @property
    def right(self) -> bool: ...


def paired_error(gained: int, lost: int, n: int) -> float:
    """Standard error of (gained - lost) / n, the difference of two shares of the same ``n`` questions.

    That of Wald with half an answer more in each of the four cells (Agresti and Min, Statistics in Medicine 24, 2005,
    Section 3): both right, both wrong, gained and lost.
    """
    more, less, total = gained + 0.5, lost + 0.5, n + 2
    return math.sqrt(more + less - (more - less) ** 2 / total) / total


@dataclass(frozen=True)
class Marks:
    """Which answers are right, by task, in the order of the questions."""

    tasks: Mapping[str, tuple[bool, ...]]

    @classmethod
    def of(cls, answers: Sequence[Judged]) -> Marks:
        """The marks of some answers, one at least."""
        found: dict[str, list[bool]] = {}
        for answer in answers:
            found.setdefault(answer.task, []).append(answer.right)
        return cls({task: tuple(marks) for task, marks in sorted(found.items())})

    @cached_property
    def accuracy(self) -> Accuracy:
        """The share of each task."""
        return accuracy_of({task: (sum(marks), len(marks)) for task, marks in self.tasks.items()})

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """The lowest share of a task, the mean over tasks, and the shares."""
        tasks = {f"{TASK}{task}": share for task, share in self.accuracy.tasks.items()}
        named = {WORST: self.accuracy.worst, MEAN: self.accuracy.mean, **tasks}
        return {name: Metric(share.value, share.se, share.n, True) for name, share in named.items()}

    def minus(self, other: Marks) -> dict[str, Difference]:
        """Differences of `metrics` to those of ``other`` on the same questions.

        The lowest shares are paired when they are of the same task; else their errors are those of independent shares.
        """
        gaps = {task: self._gap(other, task) for task in self.tasks}
        mean = math.fsum(gap.difference for gap in gaps.values()) / len(gaps)
        return {
            WORST: self._worst_gap(other, gaps),
            MEAN: Difference(mean, math.hypot(*(gap.se or 0.0 for gap in gaps.values())) / len(gaps)),
            **{f"{TASK}{task}": gap for task, gap in gaps.items()},
        }

    def _gap(self, other: Marks, task: str) -> Difference:
        pairs = list(zip(self.tasks[task], other.tasks[task], strict=True))
        gained = sum(mine and not theirs for mine, theirs in pairs)
        lost = sum(theirs and not mine for mine, theirs in pairs)
        return Difference((gained - lost) / len(pairs), paired_error(gained, lost, len(pairs)))

    def _worst_gap(self, other: Marks, gaps: Mapping[str, Difference]) -> Difference:
        mine, theirs = self.accuracy, other.accuracy
        both = [
            gaps[task].se or 0.0
            for task in gaps
            if mine.tasks[task].value == mine.worst.value and theirs.tasks[task].value == theirs.worst.value
        ]
        se = max(both) if both else math.hypot(mine.worst.se, theirs.worst.se)
        return Difference(mine.worst.value - theirs.worst.value, se)
