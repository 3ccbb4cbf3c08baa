"""One progress bar for a whole bench, with the time that is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Meter:
    """Counts work towards a total that may still grow. Made by `meter`.

    The unit is one network evaluation of one image.
    """

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar = bar
        self._task = task
        self._total = 0.0

    def expect(self, work: float) -> None:
        """Adds work that is to come."""
        self._total += work
        self._bar.update(self._task, total=self._total)

    def begin(self, what: str, work: float) -> None:
        """Leaves what was counted so far, and begins with work of another kind."""
        self._total = work
        self._bar.reset(self._task, total=work, description=what)

    def doing(self, what: str) -> None:
        """Says what the work is about from now on."""
        self._bar.update(self._task, description=what)

    def advance(self, work: float) -> None:
        """Counts work as done."""
        self._bar.advance(self._task, work)


@contextmanager
def meter(console: Console, shown: bool) -> Iterator[Meter]:
    """A `Meter` for the block; ``shown`` is False in all processes but the main one."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not shown, speed_estimate_period=120, transient=True) as bar:
        yield Meter(bar, bar.add_task("start", total=None))
