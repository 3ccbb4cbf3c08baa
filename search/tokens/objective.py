"""What a search for a recipe is for: a cost that is to be least, within limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ...samplers.errors import InputError, unknown_name
from ..budget import Relation
from ..limit import QuantityLimit
from .tally import ACCURACIES, COSTS, Tally

SURE = 2.0
"""Standard errors beyond which a limit is taken for broken before all questions were asked."""


class Slack(NamedTuple):
    """How far on the good side of a limit a tally is, in the unit of the quantity, with its standard error."""

    value: float
    se: float

    @property
    def holds(self) -> bool:
        """Whether it is on the good side."""
        return self.value >= 0

    @property
    def could_hold(self) -> bool:
        """Whether it is not on the wrong side beyond its error."""
        return self.value + SURE * self.se >= 0


@dataclass(frozen=True)
class TokenLimit(QuantityLimit):
    """A limit such as ``worst_accuracy>=0.95``, ``nfe<=16`` or ``mean_accuracy>=0.98*reference``.

    Its quantity is one of `ACCURACIES` or `COSTS`, itself or as a multiple of the reference's own.
    """

    sides: ClassVar[Mapping[str, Relation]] = {**dict.fromkeys(ACCURACIES, ">="), **dict.fromkeys(COSTS, "<=")}
    other: ClassVar[str] = "reference"
    examples: ClassVar[tuple[str, str]] = ("nfe<=16", "worst_accuracy>=0.98*reference")

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 1.0 if self.quantity in ACCURACIES and not self.relative else math.inf
        if not (0 < self.value <= most and math.isfinite(self.value)):
            what = "a finite number above 0" if most > 1 else "above 0 and at most 1"
            raise InputError(f"the value of this limit is {what}; got {str(self)!r}")

    def bound(self, reference: Tally | None) -> float:
        """The worst value that is accepted."""
        return self.value * (reference.estimate(self.quantity).value if self.relative and reference else 1.0)

    def slack(self, tally: Tally, reference: Tally | None) -> Slack:
        """How far on the good side a tally is.

        Args:
            tally: of a candidate.
            reference: of the reference, on the same questions; its error adds to the candidate's, as if they were
                independent. None for a limit that is not a multiple of it.
        """
        own = tally.estimate(self.quantity)
        difference = own.value - self.bound(reference)
        theirs = self.value * reference.estimate(self.quantity).se if self.relative and reference else 0.0
        return Slack(difference if self.relation == ">=" else -difference, math.hypot(own.se, theirs))


@dataclass(frozen=True)
class TokenObjective:
    """What is searched for.

    Attributes:
        cost: a name of `COSTS`, which is to be least.
        limits: what a recipe must keep to.
    """

    cost: str = "token_forwards"
    limits: tuple[TokenLimit, ...] = (TokenLimit("worst_accuracy", ">=", 0.98, True),)

    def __post_init__(self) -> None:
        if self.cost not in COSTS:
            raise unknown_name("objective", self.cost, COSTS)

    @property
    def needs_reference(self) -> bool:
        """Whether a limit is a multiple of the reference's value."""
        return any(limit.relative for limit in self.limits)

    @property
    def quantities(self) -> tuple[str, ...]:
        """The cost, those that are limited, and the accuracies."""
        return tuple(dict.fromkeys((self.cost, *(limit.quantity for limit in self.limits), *ACCURACIES)))

    def slacks(self, tally: Tally, reference: Tally | None) -> tuple[Slack, ...]:
        """`TokenLimit.slack` of every limit."""
        return tuple(limit.slack(tally, reference) for limit in self.limits)

    def holds(self, tally: Tally, reference: Tally | None) -> bool:
        """Whether every limit holds."""
        return all(slack.holds for slack in self.slacks(tally, reference))

    def could_hold(self, tally: Tally, reference: Tally | None) -> bool:
        """Whether no limit is broken beyond its error."""
        return all(slack.could_hold for slack in self.slacks(tally, reference))
