"""Answers to many questions, counted; counts of different questions add up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from ...eval.jackknife import Estimate
from ...eval.tokens import Answer
from ...eval.tokens.accuracy import Accuracy, accuracy_of

ACCURACIES = ("worst_accuracy", "mean_accuracy")
"""The share of right answers of the worst task, and on average over tasks."""

PRODUCT = "nfe*token_forwards"
COSTS = ("nfe", "token_forwards", PRODUCT)
"""Forward passes and positions evaluated in them, per answer, and the product of these two averages."""


class Tally(BaseModel):
    """Sums over answers, all of them whole numbers.

    Attributes:
        right: right answers and questions, by task.
        nfe: sum, and sum of squares.
        token_forwards: sum, and sum of squares.
        product: sum of the products of both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    right: dict[str, tuple[int, int]]
    nfe: tuple[int, int]
    token_forwards: tuple[int, int]
    product: int

    @classmethod
    def of(cls, answers: Iterable[Answer]) -> Tally:
        """The sums over some answers."""
        total = Tally(right={}, nfe=(0, 0), token_forwards=(0, 0), product=0)
        for answer in answers:
            nfe, forwards = answer.nfe, answer.token_forwards
            total = total + Tally(
                right={answer.task: (int(answer.right), 1)},
                nfe=(nfe, nfe**2),
                token_forwards=(forwards, forwards**2),
                product=nfe * forwards,
            )
        return total

    def __add__(self, other: Tally) -> Tally:
        """The sums over the answers of both."""
        tasks = sorted({*self.right, *other.right})
        return Tally(
            right={task: _add(self.right.get(task, (0, 0)), other.right.get(task, (0, 0))) for task in tasks},
            nfe=_add(self.nfe, other.nfe),
            token_forwards=_add(self.token_forwards, other.token_forwards),
            product=self.product + other.product,
        )

    @property
    def n(self) -> int:
        """Number of answers."""
        return sum(asked for _, asked in self.right.values())

    @property
    def accuracy(self) -> Accuracy:
        """Shares of right answers."""
        return accuracy_of(self.right)

    def estimate(self, quantity: str) -> Estimate:
        """A quantity of `ACCURACIES` or `COSTS` with its standard error, that of a product to first order."""
        if quantity in ACCURACIES:
            return self.accuracy.worst if quantity == "worst_accuracy" else self.accuracy.mean
        n, nfe, forwards = self.n, self.nfe[0] / self.n, self.token_forwards[0] / self.n
        of_nfe = _covariance(n, self.nfe[0], self.nfe[0], self.nfe[1])
        of_forwards = _covariance(n, self.token_forwards[0], self.token_forwards[0], self.token_forwards[1])
        if quantity == PRODUCT:
            together = _covariance(n, self.nfe[0], self.token_forwards[0], self.product)
            variance = forwards**2 * of_nfe + nfe**2 * of_forwards + 2 * nfe * forwards * together
            return Estimate(nfe * forwards, math.sqrt(max(variance, 0.0) / n), n)
        value, variance = (nfe, of_nfe) if quantity == "nfe" else (forwards, of_forwards)
        return Estimate(value, math.sqrt(variance / n), n)

    def values(self) -> Mapping[str, Any]:
        """All quantities with their errors, as JSON data."""
        found = {quantity: self.estimate(quantity) for quantity in (*ACCURACIES, *COSTS)}
        return {quantity: {"value": each.value, "se": each.se} for quantity, each in found.items()}


def _add(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    return first[0] + second[0], first[1] + second[1]


def _covariance(n: int, first: int, second: int, products: int) -> float:
    """Of a sample, from its sums; of one number 0."""
    return (n * products - first * second) / (n * (n - 1)) if n > 1 else 0.0
