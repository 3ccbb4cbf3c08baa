"""Shares of right answers: by task, of the worst task, and on average over tasks, with their errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..jackknife import Estimate
from .answers import Answer


def share_error(right: int, n: int) -> float:
    """Standard error of the share ``right / n``, taken at (right + 2) / (n + 4).

    That is the error of Agresti and Coull (The American Statistician 52, 1998, Section 2), which does not vanish where
    all are right or all wrong; they also move the centre of the interval, and here the share stays. Two errors on
    either side cover the true share, on average over all, in 92 % of samples of 8, 94 % of 16 and 95 % of 100.
    """
    share = (right + 2) / (n + 4)
    return math.sqrt(share * (1 - share) / (n + 4))


def share(right: int, asked: int) -> Estimate:
    """The share of right answers."""
    return Estimate(right / asked, share_error(right, asked), asked)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of right answers.

    Attributes:
        tasks: the share of each task, by name.
    """

    tasks: Mapping[str, Estimate]

    @property
    def worst_task(self) -> str:
        """The task with the smallest share, the first of those that have it."""
        return min(self.tasks, key=lambda name: self.tasks[name].value)

    @property
    def worst(self) -> Estimate:
        """The share of the worst task."""
        return self.tasks[self.worst_task]

    @property
    def mean(self) -> Estimate:
        """The average over tasks, each with the same weight."""
        shares = list(self.tasks.values())
        return Estimate(
            math.fsum(each.value for each in shares) / len(shares),
            math.hypot(*(each.se for each in shares)) / len(shares),
            sum(each.n for each in shares),
        )


def accuracy_of(counts: Mapping[str, tuple[int, int]]) -> Accuracy:
    """The accuracy from right answers and questions asked, by task."""
    return Accuracy({task: share(*count) for task, count in counts.items()})


def accuracy(answers: Iterable[Answer]) -> Accuracy:
    """The accuracy of some answers, with their tasks in order of their names."""
    counts: dict[str, tuple[int, int]] = {}
    for answer in answers:
        right, asked = counts.get(answer.task, (0, 0))
        counts[answer.task] = (right + answer.right, asked + 1)
    return accuracy_of(dict(sorted(counts.items())))
