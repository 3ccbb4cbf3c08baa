"""The progress of a training, on the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from ..eval.progress import Meter
from .loop import Watch


def training_bar(bar: Meter, updates: int) -> Watch:
    """A watch that counts the updates of the student and gives no values.

    Args:
        bar: that shows them, with the time that is left.
        updates: of the whole run. A resumed one counts from where it goes on, that the time left is right.
    """
    bar.begin("update 1", updates)
    done: int | None = None

    def watch(step: int) -> Mapping[str, float]:
        nonlocal done
        if done is None:
            done = step - 1
            bar.begin("", updates - done)
        bar.advance(step - done)
        bar.doing(f"update {step:,} of {updates:,}")
        done = step
        return {}

    return watch


def together(*watches: Watch) -> Watch:
    """One watch of several, asked in order; their values are joined."""

    def watch(step: int) -> Mapping[str, float]:
        return {name: value for each in watches for name, value in each(step).items()}

    return watch
