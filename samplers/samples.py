"""A call of a pipeline, taken apart by sample and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import InputError

PER_SAMPLE = ("class_labels", "generator", "latents")
"Arguments with one entry a sample, besides those whose name starts with one of `STARTS_WITH`."

STARTS_WITH = ("prompt", "negative_prompt", "pooled_", "negative_pooled_")

REPEATS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "images_per_prompt")

SHARED = ("timesteps", "sigmas", "callback_on_step_end_tensor_inputs", "guidance_scale", "original_size", "target_size")
"Arguments that may be lists and belong to the whole call."

NOISE = ("generator", "latents")
"Arguments by which two samples of one condition differ."


def is_per_sample(name: str) -> bool:
    """Whether a pipeline's argument of this name has one entry a sample."""
    return name in PER_SAMPLE or name.startswith(STARTS_WITH)


def count_samples(part: str, arguments: Mapping[str, Any]) -> int:
    """Number of samples that a call asks for.

    Args:
        part: the part that asks, as the user knows it.
        arguments: those of the call, by name.

    Raises:
        InputError: when the call asks for several samples a prompt, or the arguments disagree.
    """
    for name in REPEATS:
        if arguments.get(name) not in (None, 1):
            raise InputError(
                f"the {part} part decides for each sample by itself; got {name}={arguments[name]}; repeat the prompts"
            )
    if "batch_size" in arguments:
        return int(arguments["batch_size"])
    sizes = {name: _size(value) for name, value in arguments.items() if is_per_sample(name) and name != "generator"}
    known = {name: size for name, size in sizes.items() if size is not None}
    if not known:
        generator = arguments.get("generator")
        return len(generator) if isinstance(generator, list | tuple) else 1
    name, size = max(known.items(), key=lambda item: item[1])
    for other, value in known.items():
        if value != size and isinstance(arguments[other], Tensor | list | tuple):
            raise InputError(f"{name} has {size} entries and {other} {value}; give one for each sample")
    return size


def select_samples(part: str, arguments: Mapping[str, Any], rows: Sequence[int], count: int) -> dict[str, Any]:
    """The arguments of a call for some of its samples.

    What has one entry a sample (class labels, prompts, embeddings, latents, generators) is cut, ``batch_size`` set,
    and the rest passed on as it is.

    Args:
        part: the part that asks, as the user knows it.
        arguments: those of the call, by name.
        rows: which samples, in order.
        count: number of samples of the call.

    Raises:
        InputError: when an argument cannot be cut by sample: one generator for several samples, a list of another
            length, or a list or tensor of which it is not known what it belongs to.
    """
    return {name: _cut(part, name, value, rows, count) for name, value in arguments.items()}


def conditions_of(arguments: Mapping[str, Any], count: int) -> dict[str, Any]:
    """What a call asks of each of its samples: its arguments with one entry a sample, without noise and seeds.

    A single prompt for several samples is repeated.
    """
    return {
        name: [value] * count if isinstance(value, str) else value
        for name, value in arguments.items()
        if is_per_sample(name) and name not in NOISE and value is not None
    }


def merge_outputs(outputs: Sequence[tuple[Sequence[int], Any]], count: int) -> Any:
    """One output of a pipeline from those of several calls; where they overlap, the later one stands.

    Args:
        outputs: samples that a call made, and what the pipeline returned for them.
        count: number of samples together; each must be in one of the calls.

    Returns:
        An output like theirs, with one entry a sample in each field that has entries.

    Raises:
        InputError: when a field has another number of entries than samples.
    """
    first = outputs[0][1]
    if isinstance(first, tuple):
        return tuple(
            _merged(f"entry {index}", [(rows, output[index]) for rows, output in outputs], count)
            for index in range(len(first))
        )
    fields = {
        name: _merged(name, [(rows, getattr(output, name)) for rows, output in outputs], count) for name in vars(first)
    }
    return type(first)(**fields)


def with_first(output: Any, value: Any) -> Any:
    """A pipeline's output with its first field, the samples, replaced."""
    if isinstance(output, tuple):
        return (value, *output[1:])
    return type(output)(**(vars(output) | {next(iter(vars(output))): value}))


def _size(value: Any) -> int | None:
    """Entries of a per-sample argument; None where it says nothing about their number."""
    if isinstance(value, str):
        return 1
    if isinstance(value, Tensor | np.ndarray):
        return value.shape[0] if value.ndim else 1
    return len(value) if isinstance(value, list | tuple) else None


def _cut(part: str, name: str, value: Any, rows: Sequence[int], count: int) -> Any:
    if name == "batch_size":
        return len(rows)
    if isinstance(value, torch.Generator) and count > 1:
        raise InputError(
            f"the {part} part runs samples apart; give a list of {count} generators instead of one for all"
        )
    if not isinstance(value, list | tuple | Tensor | np.ndarray) or name in SHARED:
        return value
    if not is_per_sample(name):
        raise InputError(f"the {part} part runs samples apart and does not know how to cut {name}; leave it out")
    if len(value) != count:
        raise InputError(f"{name} has {len(value)} entries for {count} samples; give one for each sample")
    if isinstance(value, Tensor | np.ndarray):
        return value[list(rows)]
    return type(value)(value[row] for row in rows)


def _merged(name: str, pieces: Sequence[tuple[Sequence[int], Any]], count: int) -> Any:
    first = pieces[0][1]
    if first is None:
        return None
    if not isinstance(first, Tensor | np.ndarray | list):
        raise InputError(f"the pipeline's output has {name} of type {type(first).__name__}, which has no samples")
    for rows, piece in pieces:
        if len(piece) != len(rows):
            raise InputError(f"the pipeline's output has {len(piece)} entries in {name} for {len(rows)} samples")
    merged: list[Any] = [None] * count
    for rows, piece in pieces:
        for row, entry in zip(rows, piece, strict=True):
            merged[row] = entry
    if isinstance(first, Tensor):
        return torch.stack(merged)
    return np.stack(merged) if isinstance(first, np.ndarray) else merged
