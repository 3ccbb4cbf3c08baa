"""The log of a run: one line of JSON per update of the student, and the trackers that accelerate knows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from ..samplers.errors import InputError
from ..samplers.files import write_text
from .loop_options import LoopOptions


class RunLog:
    """``log.jsonl`` of a run. Only the main process writes to it.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log.jsonl"

    def lines(self) -> Iterator[dict[str, Any]]:
        """All complete lines."""
        if not self.path.is_file():
            return
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(text)
            except json.JSONDecodeError:  # a run was killed while it wrote this
                continue

    def cut(self, step: int) -> None:
        """Drops what is later than update ``step``, and a line that was cut off."""
        kept = [line for line in self.lines() if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a line; numbers that are not finite become null.

        Raises:
            InputError: when it cannot be written.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, **finite}) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error


class Means:
    """The means of measurements since they were last taken."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Counts each value once."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means, in alphabetical order; the next ones start anew."""
        means = {name: self._sums[name] / self._counts[name] for name in sorted(self._sums)}
        self._sums, self._counts = {}, {}
        return means


def make_accelerator(options: LoopOptions, cpu: bool = False) -> Accelerator:
    """The accelerator of a run: precision and trackers of the options, all else as accelerate is configured.

    Args:
        options: of the run.
        cpu: whether to stay on the CPU.

    Raises:
        InputError: for a tracker that accelerate does not know or that is not installed, and a precision that the
            device does not have or that is not what this process began with.
    """
    names = [] if options.report_to == "none" else options.report_to.split(",")
    available = [tracker.value for tracker in get_available_trackers()]
    for name in names:
        if name != "all" and name not in available:
            raise InputError(
                f"--report_to {name} is no tracker that is installed; "
                f"install its package or take one of: {', '.join([*available, 'all', 'none'])}"
            )
    try:
        return Accelerator(
            cpu=cpu,
            mixed_precision=options.mixed_precision,
            log_with=names or None,
            project_dir=options.output_dir,
        )
    except ValueError as error:
        raise InputError(f"--mixed_precision {options.mixed_precision}: {error}") from error


def tracked_settings(settings: Mapping[str, Any]) -> dict[str, int | float | str | bool]:
    """Settings in the types that all trackers take; what is of another type becomes text."""
    plain = (int, float, str, bool)
    return {name: value if isinstance(value, plain) else str(value) for name, value in settings.items()}
