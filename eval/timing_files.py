"""Timings as files, so that a bench that was stopped does not measure again what it measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from ..samplers.errors import InputError
from ..samplers.files import read_json, write_json
from .environment import device_name
from .timing import Timing

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Measured = TypeVar("Measured")

_TIMING = TypeAdapter(Timing)


def timing_conditions(device: str, batch_size: int, repeats: int) -> dict[str, Any]:
    """What a timing depends on besides the configuration: a file with other conditions is measured again."""
    return {
        "device": device_name(device),
        "torch_threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "repeats": repeats,
    }


def load_timing(path: Path, conditions: dict[str, Any]) -> Timing | None:
    """A timing under these conditions, or None when there is none; see `load_measured`."""
    return load_measured(path, conditions, _TIMING)


def load_measured(path: Path, conditions: dict[str, Any], kind: TypeAdapter[Measured]) -> Measured | None:
    """What was measured under these conditions, or None when there is nothing.

    Args:
        path: that `save_timing` wrote.
        conditions: of `timing_conditions`.
        kind: of what it holds.

    Raises:
        InputError: when the file is damaged.
    """
    if not path.is_file():
        return None
    value = read_json(path)
    try:
        if value["conditions"] != conditions:
            return None
        return kind.validate_python(value["timing"])
    except (KeyError, TypeError, ValidationError):
        raise InputError(f"{path} is not a timing of this version of fewstep; delete it and run again") from None


def save_timing(path: Path, conditions: dict[str, Any], timing: DataclassInstance) -> None:
    """Writes a timing, or a dataclass that holds one, complete or not at all."""
    write_json(path, {"conditions": conditions, "timing": dataclasses.asdict(timing)})
