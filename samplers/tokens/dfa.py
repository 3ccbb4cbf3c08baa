"""Answers that match a pattern."""

from __future__ import annotations

from functools import cache
from typing import Literal

from pydantic import Field, field_validator

from .automaton import Automaton, compiled
from .language import Language
from .pattern import parsed
from .slots import CONSTRAINTS


@CONSTRAINTS.register("dfa")
class Dfa(Language):
    """Every answer matches a regular expression as a whole; see `Language` for what is guaranteed.

    The notation is that of `pattern.parsed`. What tokens spell is handed over as the resource ``vocabulary``; a token
    may spell several characters.
    """

    type: Literal["dfa"] = "dfa"
    pattern: str = Field(min_length=1, max_length=10_000, description="Regular expression for the whole answer.")

    @field_validator("pattern")
    @classmethod
    def _understood(cls, pattern: str) -> str:
        parsed(pattern)
        return pattern

    def automaton(self) -> Automaton:
        """The pattern's."""
        return _of(self.pattern)


@cache
def _of(pattern: str) -> Automaton:
    return compiled(parsed(pattern))
