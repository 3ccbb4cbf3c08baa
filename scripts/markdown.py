"""Pieces of generated documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float, se: float, digits: int = 2, sign: str = "") -> str:
    """A value with its standard error; ``sign`` is ``+`` for differences."""
    return f"{value:{sign}.{digits}f} ± {se:.{digits}f}"
