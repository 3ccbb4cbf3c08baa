"""Limits on what is measured, as a person writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from ..samplers.errors import InputError, unknown_name
from .budget import Relation


@dataclass(frozen=True)
class QuantityLimit:
    """A limit such as ``nfe<=5`` or ``fd<=1.02*teacher``. A subclass says of which quantities, and whose multiples.

    Attributes:
        quantity: a name of `sides`.
        relation: on which side of the value good ones are.
        value: the worst value that is accepted, or what the other's is multiplied by.
        relative: whether the limit is a multiple of the other's own value.
    """

    sides: ClassVar[Mapping[str, Relation]]
    "Quantities, and on which side of a limit their good values are."
    other: ClassVar[str]
    "Whose multiples there are."
    examples: ClassVar[tuple[str, str]]
    "For error messages: a limit by a number, and one by a multiple."

    quantity: str
    relation: Relation
    value: float
    relative: bool = False

    def __post_init__(self) -> None:
        self.check_quantity(self.quantity)
        good = self.sides[self.quantity]
        if self.relation != good:
            raise InputError(f"good values of {self.quantity} are {good} the limit; got {str(self)!r}")

    @classmethod
    def check_quantity(cls, name: str) -> None:
        """Raises ``InputError``, with a suggestion, for the name of a quantity that has no limits."""
        if name not in cls.sides:
            raise unknown_name("quantity", name, cls.sides)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The limit that ``fd<=1.02*teacher`` says; ``fd<=teacher`` is short for the factor 1.

        Raises:
            InputError: when it is not of that form, of an unknown quantity, or on the wrong side.
        """
        match = re.fullmatch(rf"\s*([\w*]+)\s*(<=|>=)\s*(\S+?)\s*(\*\s*{cls.other})?\s*", text)
        quantity, relation, number, times = match.groups() if match else ("", "", "", None)
        if number == cls.other and times is None:
            number, times = "1", number
        try:
            value = float(number)
        except ValueError:
            raise InputError(
                f"a limit is a quantity, <= or >=, and a number or a multiple of the {cls.other}'s value, such as "
                f"{cls.examples[0]} or {cls.examples[1]}; got {text!r}"
            ) from None
        return cls(quantity, "<=" if relation == "<=" else ">=", value, times is not None)

    def __str__(self) -> str:
        return f"{self.quantity}{self.relation}{self.value:g}{f'*{self.other}' if self.relative else ''}"
