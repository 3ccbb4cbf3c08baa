"""What a search is for: the quality that candidates are ranked by, a second objective, and limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from ..eval.metrics import KINDS
from ..samplers.errors import InputError, unknown_name
from .budget import METRICS, Relation
from .limit import QuantityLimit

if TYPE_CHECKING:
    from .measure import Measured

RELATIVE_ERROR = "relative_error"
"Relative L2 distance to what the teacher's plan returns, before images are rounded."

QUALITIES: Mapping[str, Relation] = {
    **{kind: ">=" if entry.higher_is_better else "<=" for kind, entry in KINDS.items()},
    RELATIVE_ERROR: METRICS[RELATIVE_ERROR].relation,
}
"""On which side of a limit good values of a quality are: of the metrics of a bench, without the network's name, and of
the relative error."""

PAIRED = frozenset({RELATIVE_ERROR, *(kind for kind, entry in KINDS.items() if entry.against == "reference")})
"Qualities that compare each sample with the teacher's of the same number."

COSTS = ("nfe", "flops", "latency_s")
"""Network rows per image (a guided step counts 2 where both branches ran); floating-point operations and seconds of a
call for one image."""

LEAST_IMAGES = 4
"Fewer have no error."


@dataclass(frozen=True)
class Limit(QuantityLimit):
    """A limit such as ``nfe<=5``, ``latency_s<=0.04``, ``fd<=1.02*teacher`` or ``class_accuracy>=0.98*teacher``.

    Its quantity is one of `QUALITIES` or `COSTS`, itself or as a multiple of the teacher's own.
    """

    sides: ClassVar[Mapping[str, Relation]] = {**QUALITIES, **dict.fromkeys(COSTS, "<=")}
    other: ClassVar[str] = "teacher"
    examples: ClassVar[tuple[str, str]] = ("nfe<=5", "fd<=1.02*teacher")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.value):
            raise InputError(f"the value of a limit is a finite number; got {str(self)!r}")
        if self.value <= 0 and (self.relative or self.quantity in COSTS):
            what = "a multiple of the teacher's value" if self.relative else f"a limit of {self.quantity}"
            raise InputError(f"{what} is above 0; got {str(self)!r}")
        if self.relative and self.quantity in PAIRED:
            raise InputError(
                f"{self.quantity} is measured against the teacher, which has none itself; got {str(self)!r}; "
                "give a number"
            )

    def violation(self, values: Mapping[str, float], teacher: Mapping[str, float] | None = None) -> float:
        """By how much a candidate is on the wrong side, as a share of the limit; 0 or less where it holds.

        Shares add up over limits of different units, as optuna's samplers add them. A limit of 0 is measured in
        the unit of the quantity.

        Args:
            values: the candidate's numbers by quantity.
            teacher: the teacher's, for limits that are multiples of them.

        Raises:
            InputError: for a multiple of the teacher's value without a teacher.
        """
        if self.relative and teacher is None:
            raise InputError(f"the limit {self} needs a teacher; give its plan")
        bound = self.value * teacher[self.quantity] if self.relative and teacher else self.value
        excess = values[self.quantity] - bound if self.relation == "<=" else bound - values[self.quantity]
        return excess / (abs(bound) or 1.0)


@dataclass(frozen=True)
class Objective:
    """What is searched for.

    Attributes:
        quality: a name of `QUALITIES`.
        cost: a name of `COSTS` for a front of two objectives, or None.
        limits: what a plan must keep to.
        rungs: numbers of images at which a candidate is measured, growing; the last decides.
    """

    quality: str = "fd"
    cost: str | None = None
    limits: tuple[Limit, ...] = ()
    rungs: tuple[int, ...] = (256, 1024)

    def __post_init__(self) -> None:
        if self.quality not in QUALITIES:
            raise unknown_name("quality", self.quality, QUALITIES)
        if self.cost is not None and self.cost not in COSTS:
            raise unknown_name("cost", self.cost, COSTS)
        shown = ", ".join(map(str, self.rungs)) or "none"
        if not self.rungs or any(b <= a for a, b in pairwise(self.rungs)):
            raise InputError(f"rungs are numbers of images that grow, one at least; got {shown}")
        if self.rungs[0] < LEAST_IMAGES:
            raise InputError(f"a rung is at least {LEAST_IMAGES} images, fewer have no error; got {shown}")

    @property
    def quantities(self) -> tuple[str, ...]:
        """Everything that must be measured."""
        named = (self.quality, *([self.cost] if self.cost else []), *(limit.quantity for limit in self.limits))
        return tuple(dict.fromkeys(named))

    @property
    def needs_teacher(self) -> bool:
        """Whether the quality or a limit compares with a teacher."""
        return any(limit.relative for limit in self.limits) or not PAIRED.isdisjoint(self.quantities)

    def loss(self, measured: Measured) -> float:
        """What is minimised: the quality, negated where higher is better."""
        value = measured.values[self.quality].value
        return value if QUALITIES[self.quality] == "<=" else -value

    def violations(self, measured: Measured, teacher: Measured | None = None) -> tuple[float, ...]:
        """`Limit.violation` of every limit.

        Raises:
            InputError: for a multiple of the teacher's value without a teacher.
        """
        theirs = None if teacher is None else teacher.numbers
        return tuple(limit.violation(measured.numbers, theirs) for limit in self.limits)
