"""The progress of a training, on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

from ..eval.progress import meter
from .loop import Watch


@contextmanager
def training_bar(console: Console, shown: bool, updates: int) -> Iterator[Watch]:
    """A bar of the updates of the student, with the time that is left.

    Args:
        console: where it is drawn.
        shown: False in all processes but the main one.
        updates: of the whole run. A resumed one counts from where it goes on, that the time left is right.

    Yields:
        A watch that gives no values.
    """
    with meter(console, shown) as bar:
        bar.doing("update 1")
        done: int | None = None

        def watch(step: int) -> Mapping[str, float]:
            nonlocal done
            if done is None:
                done = step - 1
                bar.expect(updates - done)
            bar.advance(step - done)
            bar.doing(f"update {step:,} of {updates:,}")
            done = step
            return {}

        yield watch


def together(*watches: Watch) -> Watch:
    """One watch of several, asked in order; their values are joined."""

    def watch(step: int) -> Mapping[str, float]:
        return {name: value for each in watches for name, value in each(step).items()}

    return watch
