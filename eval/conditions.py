"""What each image is asked to show: labels, prompts or nothing, decided by the image's seed alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers.models.embeddings import LabelEmbedding

from ..samplers.errors import InputError
from ..samplers.network import denoisers


@dataclass(frozen=True)
class Conditions:
    """The condition of every seed: entry ``seed mod len(values)``.

    Attributes:
        kind: which input of the pipeline the values are for; ``none`` for an unconditional pipeline.
        values: class labels or prompts; empty when ``kind`` is ``none``.
    """

    kind: Literal["labels", "prompts", "none"]
    values: tuple[int, ...] | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.kind == "none") != (not self.values):
            raise InputError(f"conditions of kind {self.kind!r} with {len(self.values)} values; give at least one")

    def codes(self, seeds: Sequence[int]) -> list[int]:
        """What a shard stores per image: the label, the index of the prompt, or -1."""
        if self.kind == "labels":
            return [int(self.values[seed % len(self.values)]) for seed in seeds]
        if self.kind == "prompts":
            return [seed % len(self.values) for seed in seeds]
        return [-1] * len(seeds)

    def inputs(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Arguments of the pipeline's call that ask for these images, one entry per image."""
        picked = [self.values[seed % len(self.values)] for seed in seeds] if self.values else []
        if self.kind == "labels":
            return {"class_labels": picked}
        if self.kind == "prompts":
            return {"prompt": picked}
        return {"batch_size": len(seeds)}

    def to_json(self) -> dict[str, Any]:
        """For the record of a run."""
        return {"kind": self.kind, "values": list(self.values)}


def conditions_for(pipe: Any, *, class_labels: Sequence[int] = (), prompts: Path | None = None) -> Conditions:
    """The conditions that the call of ``pipe`` takes.

    Args:
        pipe: a diffusers pipeline.
        class_labels: labels to cycle through; empty means all labels that the pipeline names.
        prompts: text file with one prompt a line.

    Raises:
        InputError: when the pipeline takes other conditions than those given, or needs some, or does not know a label.
    """
    arguments = inspect.signature(pipe.__call__).parameters
    name = type(pipe).__name__
    if class_labels and "class_labels" not in arguments:
        raise InputError(f"--class_labels: {name} takes no class labels; leave the option out")
    if prompts is not None and "prompt" not in arguments:
        raise InputError(f"--prompts: {name} takes no prompts; leave the option out")
    if "class_labels" in arguments:
        check_labels(pipe, class_labels)
        return Conditions("labels", tuple(class_labels) or _named_labels(pipe))
    if "prompt" in arguments:
        if prompts is None:
            raise InputError(f"{name} needs prompts; give a text file with one prompt a line as --prompts FILE")
        return Conditions("prompts", read_prompts(prompts))
    if "batch_size" not in arguments:
        raise InputError(f"{name} takes neither class labels, prompts nor a batch size; fewstep cannot drive it")
    return Conditions("none")


def check_labels(pipe: Any, labels: Sequence[int]) -> None:
    """Refuses class labels that the pipeline's network has no row for; that of no class is one of its rows.

    Raises:
        InputError: for the first of them.
    """
    network = next(iter(denoisers(pipe).values()))
    tables = (part.embedding_table for part in network.modules() if isinstance(part, LabelEmbedding))
    size = next((table.num_embeddings for table in tables), None)
    if size is None:
        return
    for label in labels:
        if not 0 <= label < size:
            name = type(pipe).__name__
            raise InputError(
                f"the network of {name} has a table of {size} labels, 0 to {size - 1}; got the label {label}"
            )


def _named_labels(pipe: Any) -> tuple[int, ...]:
    labels = tuple(sorted({int(label) for label in (getattr(pipe, "labels", None) or {}).values()}))
    if not labels:
        raise InputError(f"{type(pipe).__name__} names no labels; give them as --class_labels 0 1 2 ...")
    return labels


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty.

    Raises:
        InputError: when it cannot be read or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {path} cannot be read ({error}); give a text file in UTF-8") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise InputError(f"--prompts {path} holds no prompt; write one a line")
    return prompts
