"""Shares of right answers by task, with errors, and their differences on the same questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from ..record import Difference, Metric

WORST, MEAN, TASK = "worst_accuracy", "mean_accuracy", "accuracy_"
"Metrics; the last one is followed by the name of a task."


class Judged(Protocol):
    """An answer to a task that is right or wrong."""

    @property
    def task(self) -> str: ...

    @property
    def right(self) -> bool: ...


def share_error(right: int, n: int) -> float:
    """Standard error of the share ``right / n``, taken at (right + 2) / (n + 4).

    That is the error of Agresti and Coull (The American Statistician 52, 1998, Section 2), which does not vanish where
    all are right or all wrong; they also move the centre of the interval, and here the share stays. Two errors on
    either side cover the true share, on average over all, in 92 % of samples of 8, 94 % of 16 and 95 % of 100.
    """
    share = (right + 2) / (n + 4)
    return math.sqrt(share * (1 - share) / (n + 4))


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
    def shares(self) -> dict[str, Metric]:
        """The share of each task."""
        return {
            task: Metric(sum(marks) / len(marks), share_error(sum(marks), len(marks)), len(marks), True)
            for task, marks in self.tasks.items()
        }

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """The lowest share of a task, the mean over tasks, and the shares."""
        shares = self.shares
        mean = sum(share.value for share in shares.values()) / len(shares)
        total = sum(share.n for share in shares.values())
        return {
            WORST: min(shares.values(), key=lambda share: (share.value, share.n)),
            MEAN: Metric(mean, _mean_error([share.se or 0.0 for share in shares.values()]), total, True),
            **{f"{TASK}{task}": share for task, share in shares.items()},
        }

    def minus(self, other: Marks) -> dict[str, Difference]:
        """Differences of `metrics` to those of ``other`` on the same questions.

        The lowest shares are paired when they are of the same task; else their errors are those of independent shares.
        """
        gaps = {task: self._gap(other, task) for task in self.tasks}
        mean = sum(gap.difference for gap in gaps.values()) / len(gaps)
        return {
            WORST: self._worst_gap(other, gaps),
            MEAN: Difference(mean, _mean_error([gap.se or 0.0 for gap in gaps.values()])),
            **{f"{TASK}{task}": gap for task, gap in gaps.items()},
        }

    def _gap(self, other: Marks, task: str) -> Difference:
        pairs = list(zip(self.tasks[task], other.tasks[task], strict=True))
        gained = sum(mine and not theirs for mine, theirs in pairs)
        lost = sum(theirs and not mine for mine, theirs in pairs)
        return Difference((gained - lost) / len(pairs), paired_error(gained, lost, len(pairs)))

    def _worst_gap(self, other: Marks, gaps: Mapping[str, Difference]) -> Difference:
        mine, theirs = self.metrics[WORST], other.metrics[WORST]
        both = [
            gaps[task].se or 0.0
            for task in gaps
            if self.shares[task].value == mine.value and other.shares[task].value == theirs.value
        ]
        se = max(both) if both else math.hypot(mine.se or 0.0, theirs.se or 0.0)
        return Difference(mine.value - theirs.value, se)


def _mean_error(errors: Sequence[float]) -> float:
    return math.hypot(*errors) / len(errors)
