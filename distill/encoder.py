"""Conditions of prompts or class labels, encoded by a pipeline when they are asked for, and kept on disk."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..eval.conditions import check_labels
from ..eval.generate import PER_IMAGE_ARGUMENTS
from ..samplers.errors import InputError
from ..samplers.fingerprint import fingerprint
from ..samplers.network import denoisers
from .conditions import Condition, Layout
from .encode import encode

Kind = Literal["labels", "prompts", "none"]

Value = str | int | None
"""A prompt, a class label, or None for a pipeline that takes neither."""

_ARGUMENTS: dict[Kind, str] = {"labels": "class_labels", "prompts": "prompt", "none": "batch_size"}

_HELD = 256
"Conditions of single samples that are held in memory at most."


class Encoder:
    """From prompts or labels to conditions.

    Args:
        pipe: a diffusers pipeline without a plan.
        call_kwargs: further arguments of its call, such as sizes, the scale of guidance and a negative prompt; plain
            values, for files remember them.
        folder: where the condition of each value is kept as one safetensors file, unconditional branch included; None
            to encode whenever one is asked for.

    Raises:
        InputError: when the pipeline takes neither prompts, labels nor a number of images, or an argument is no plain
            value.
    """

    def __init__(self, pipe: Any, call_kwargs: Mapping[str, Any] | None = None, folder: Path | None = None) -> None:
        self.pipe = pipe
        self.call_kwargs = dict(call_kwargs or {})
        self.folder = folder
        known = inspect.signature(type(pipe).__call__).parameters
        kinds = [kind for kind, name in _ARGUMENTS.items() if name in known]
        if not kinds:
            raise InputError(
                f"{type(pipe).__name__} takes neither class labels, prompts nor a batch size; fewstep cannot drive it"
            )
        self.kind: Kind = kinds[0]
        self._remembered = self._config()
        self._layout: Layout | None = None
        self._held: dict[Value, Condition] = {}

    @property
    def layout(self) -> Layout:
        """How the pipeline calls its network; found out by encoding something where nothing was encoded yet.

        Raises:
            InputError: as `encode`.
        """
        if self._layout is None:
            self._layout = encode(self.pipe, self.arguments([self.something])).layout
        return self._layout

    @property
    def something(self) -> Value:
        """A value that the pipeline takes."""
        some: dict[Kind, Value] = {"labels": 0, "prompts": "", "none": None}
        return some[self.kind]

    def arguments(self, values: Sequence[Value]) -> dict[str, Any]:
        """Arguments of the pipeline's call that ask for these values, one sample each.

        Raises:
            InputError: when the pipeline does not take values of this sort.
        """
        self.check(values)
        lists = {
            name: [value] * len(values) if name in PER_IMAGE_ARGUMENTS and isinstance(value, str) else value
            for name, value in self.call_kwargs.items()
        }
        asked = len(values) if self.kind == "none" else list(values)
        return lists | {_ARGUMENTS[self.kind]: asked}

    def check(self, values: Sequence[Value]) -> None:
        """Refuses values that the pipeline does not take.

        Raises:
            InputError: for the first of them.
        """
        wanted = {"labels": int, "prompts": str, "none": type(None)}[self.kind]
        wrong = next((value for value in values if type(value) is not wanted), ...)
        if wrong is not ...:
            takes = {"labels": "class labels", "prompts": "prompts", "none": "no condition"}[self.kind]
            given = {int: "label", str: "prompt"}.get(type(wrong), "sample without a condition")
            shown = "" if wrong is None else f" {wrong!r}"
            raise InputError(f"{type(self.pipe).__name__} takes {takes}; got the {given}{shown}")
        if self.kind == "labels":
            check_labels(self.pipe, [value for value in values if isinstance(value, int)])

    def encode(self, values: Sequence[Value]) -> Condition:
        """The condition of samples of these values, on the CPU.

        Raises:
            InputError: as `arguments` and `encode`, or when a file is damaged.
        """
        if self.folder is None or self.kind == "none":
            condition = encode(self.pipe, self.arguments(values), self.layout)
            return condition.to("cpu")
        self.check(values)
        missing = [
            value for value in dict.fromkeys(values) if value not in self._held and not self.path(value).is_file()
        ]
        if missing:
            self._write(missing)
        return Condition.cat([self._row(value) for value in values])

    def make(
        self,
        values: Sequence[Value],
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Encodes and writes what is missing on disk of some values.

        Args:
            values: prompts or labels; repeats count once.
            batch_size: values per call of the pipeline.
            rank: number of this process.
            world: number of processes.
            progress: called with the number of values after each call.

        Raises:
            InputError: as `encode`, or without a folder.
        """
        if self.folder is None:
            raise InputError("conditions are written where a folder is given; give folder=")
        self.check(values)
        mine = list(dict.fromkeys(values))[rank::world]
        missing = [value for value in mine if not self.path(value).is_file()]
        for start in range(0, len(missing), batch_size):
            some = missing[start : start + batch_size]
            self._write(some)
            progress(len(some))

    def path(self, value: Value) -> Path:
        """The file of a value, named by what decides about its content."""
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(f'{self._remembered}{value!r}'.encode()).hexdigest()[:32]}.safetensors"

    def disk_bytes(self, values: Sequence[Value]) -> int:
        """What the files of some values take, from the size of one; none of them is written but the first."""
        distinct = list(dict.fromkeys(values))
        self.encode(distinct[:1])
        return len(distinct) * (self.path(distinct[0]).stat().st_size if self.folder and distinct else 0)

    def _config(self) -> str:
        """What decides about conditions besides the values: arguments and encoders."""
        try:
            arguments = json.dumps(self.call_kwargs, sort_keys=True)
        except TypeError as error:
            raise InputError(f"arguments of the call are remembered as JSON ({error}); give plain values") from None
        networks = set(map(id, denoisers(self.pipe).values()))
        encoders = {
            name: fingerprint(part)
            for name, part in sorted(self.pipe.components.items())
            if isinstance(part, nn.Module) and id(part) not in networks and "encoder" in name
        }
        return json.dumps([type(self.pipe).__name__, arguments, encoders])

    def _write(self, values: Sequence[Value]) -> None:
        condition = encode(self.pipe, self.arguments(values), self.layout).to("cpu")
        for row, value in enumerate(values):
            condition.rows([row]).save(self.path(value), {"value": json.dumps(value)})

    def _row(self, value: Value) -> Condition:
        if value not in self._held:
            if len(self._held) >= _HELD:
                del self._held[next(iter(self._held))]
            self._held[value] = Condition.load(self.path(value))
        return self._held[value]
