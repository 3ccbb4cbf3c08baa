"""A knowledge base for ReDi: what clean samples looked like at the value time, by how they looked at the key step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import InputError
from .files import read_tensors, write_tensors
from .network import Evaluation

_FORMAT = "fewstep-knowledge-base-1"

HEADER_BYTES = 4096
"What a file may hold beside its trajectories."

_CHUNK = 1 << 22
"Distances held at once (16 MiB)."


@dataclass(frozen=True)
class KnowledgeBase:
    """Trajectories at the key step.

    Attributes:
        keys: float16 (n, ...) the clean samples predicted at the key step.
        values: float16 (n, ...) the clean samples predicted at the value time.
        labels: int64 (n,) the class of each trajectory, or None.
        grid: times of the plan up to the key step, and the value time: k + 1 numbers, decreasing.
        weights: fingerprint of the network that they are of.
    """

    keys: Tensor
    values: Tensor
    labels: Tensor | None
    grid: tuple[float, ...]
    weights: str

    def __post_init__(self) -> None:
        n = len(self.keys)
        if self.values.shape != self.keys.shape or (self.labels is not None and self.labels.shape != (n,)):
            raise InputError("the knowledge base's keys, values and labels are not of one size; build it again")
        if n == 0 or len(self.grid) < 2:
            raise InputError("the knowledge base is empty; build it again")
        if not (bool(self.keys.isfinite().all()) and bool(self.values.isfinite().all())):
            raise InputError("the knowledge base holds values that are not finite in half precision; build it again")

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        labels = 0 if self.labels is None else self.labels.nbytes
        return self.keys.nbytes + self.values.nbytes + labels

    def to(self, device: torch.device | str) -> KnowledgeBase:
        """The same on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        keys, values = self.keys.to(device), self.values.to(device)
        return KnowledgeBase(keys, values, labels, self.grid, self.weights)

    def save(self, path: str | Path) -> None:
        """Writes it as one safetensors file, for the folder of the plan; the file is complete or absent."""
        tensors = {"keys": self.keys, "values": self.values}
        tensors |= {} if self.labels is None else {"labels": self.labels}
        header = {"format": _FORMAT, "grid": json.dumps(self.grid), "weights": self.weights}
        write_tensors(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> KnowledgeBase:
        """Reads what `save` wrote.

        Raises:
            InputError: when the file is missing, a pickle, corrupted, or holds something else.
        """
        tensors, header = read_tensors(Path(path))
        halves = [tensors[name].dtype for name in ("keys", "values") if name in tensors]
        try:
            if header.get("format") != _FORMAT or halves != [torch.float16] * 2:
                raise ValueError
            grid = tuple(float(time) for time in json.loads(header.get("grid", "")))
        except (ValueError, TypeError):
            raise InputError(
                f"{path} holds no knowledge base; make it with build_knowledge_base(...).save(path)"
            ) from None
        return cls(tensors["keys"], tensors["values"], tensors.get("labels"), grid, header.get("weights", ""))

    def nearest(self, keys: Tensor, labels: Tensor | None, count: int) -> Tensor:
        """The nearest trajectories, by exact Euclidean distance of the keys.

        Args:
            keys: (rows, ...) clean samples predicted at the key step.
            labels: (rows,) only trajectories of the same label are near; None for all.
            count: how many.

        Returns:
            int64 (rows, count), the nearest first.

        Raises:
            InputError: when there are fewer than ``count`` of a label.
        """
        centre = self.keys[:1].float().flatten(1)
        query = keys.float().flatten(1) - centre
        best = query.new_full((len(query), 0), 0.0)
        index = torch.zeros_like(best, dtype=torch.int64)
        size = max(1, _CHUNK // len(query))
        for start in range(0, len(self.keys), size):
            part = self.keys[start : start + size].float().flatten(1) - centre
            distance = part.square().sum(1) - 2 * query @ part.T  # up to the query's own square
            if labels is not None and self.labels is not None:
                distance = distance.masked_fill(labels[:, None] != self.labels[start : start + size], torch.inf)
            places = torch.arange(start, start + len(part), device=index.device).expand_as(distance)
            best, order = torch.cat([best, distance], 1).sort(dim=1, stable=True)
            best = best[:, :count]
            index = torch.cat([index, places], 1).gather(1, order[:, :count])
        if index.shape[1] < count or not bool(best.isfinite().all()):
            raise InputError(
                f"the knowledge base holds fewer than {count} trajectories for a query; build a larger one"
            )
        return index


def class_labels(evaluation: Evaluation, condition: str) -> Tensor:
    """Class labels (rows,) of an evaluation.

    Raises:
        InputError: when the network takes none by this name.
    """
    labels = evaluation.inputs.get(condition)
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        raise InputError(
            f"{type(evaluation.network).__name__} takes no class labels as {condition!r}; its inputs are "
            f"{', '.join(evaluation.inputs)}"
        )
    return labels


def same_time(one: float, other: float) -> bool:
    """Whether two times are one, up to the rounding of float32."""
    return abs(one - other) <= 1e-5 * max(1.0, abs(one), abs(other))
