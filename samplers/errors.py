"""The error of bad input, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import ValidationError


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line that names the value and the mend. The command line prints it and exits with 2.
    """


def unknown_name(what: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is in no list, with the nearest known one as suggestion."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return InputError(f"unknown {what} {name!r}; {hint}known: {', '.join(names) or 'none'}")


def first_problem(error: ValidationError) -> str:
    """What is wrong with the first bad field of a model, in one line: its place, the reason and the value."""
    problem = error.errors()[0]
    place = ".".join(str(step) for step in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    value = "" if problem["type"] == "value_error" else f"; got {problem['input']!r}"
    return f"{place + ': ' if place else ''}{message}{value}"
