"""Names to classes, with suggestions for a name that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from .errors import unknown_name

T = TypeVar("T")
C = TypeVar("C")


class Registry(Generic[T]):
    """A table of named things of one kind.

    Args:
        what: the kind, as it appears in error messages (``"solver"``).
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._table: dict[str, T] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Decorator that enters its argument under ``name``; a taken name raises ``KeyError``."""

        def enter(item: C) -> C:
            if name in self._table:
                raise KeyError(f"{self.what} {name!r} is registered already")
            self._table[name] = item  # type: ignore[assignment]
            return item

        return enter

    def __getitem__(self, name: str) -> T:
        """The thing called ``name``.

        Raises:
            InputError: with the nearest known name, when there is none.
        """
        if name not in self._table:
            raise unknown_name(self.what, name, self._table)
        return self._table[name]

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._table)
