"""Some rows of a batch: picked out of the arguments of a call, put back, and counted as samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cache_call import take_rows
from .network import STATE_NAMES, Evaluation

NOT_BATCHED = (
    "img_ids",
    "txt_ids",
    "image_rotary_emb",
    "rotary_emb",
    "rotary_embedding",
    "query_rotary_emb",
    "key_rotary_emb",
    "freqs_cis",
    "rope",
)
"Inputs whose first dimension is a sequence, whatever its length."


def pick_rows(name: str, value: Any, picks: Tensor, rows: int) -> Any:
    """Some rows of an argument, and of the tensors in it.

    A tensor (rows * k, ...) has rows. Positions of a sequence, by name, have them only where a dimension for them comes
    before those of the sequence and of the features.

    Args:
        name: of the argument.
        value: it: a tensor, or anything with tensors in its lists, tuples and dictionaries.
        picks: int64 (m,) which rows.
        rows: how many there are.
    """
    if isinstance(value, Tensor):
        if name in NOT_BATCHED and (value.ndim < 3 or len(value) != rows):
            return value
        return take_rows(value, picks, rows)
    if isinstance(value, dict):
        return {key: pick_rows(name if name in NOT_BATCHED else key, item, picks, rows) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(pick_rows(name, item, picks, rows) for item in value)
    return value


def put_rows(whole: Tensor, part: Tensor, picks: Tensor, rows: int) -> Tensor:
    """A tensor with some of its rows replaced.

    Args:
        whole: (rows * k, ...).
        part: (len(picks) * k, ...) the new rows.
        picks: int64 (m,) which rows they are.
        rows: how many there are.
    """
    grouped = whole.reshape(rows, -1, *whole.shape[1:])
    return grouped.index_copy(0, picks.to(whole.device), part.reshape(len(picks), *grouped.shape[1:])).flatten(0, 1)


def narrowed(evaluation: Evaluation, picks: Tensor) -> Evaluation:
    """An evaluation of some of its rows.

    Args:
        evaluation: of all of them.
        picks: int64 (m,) which rows.
    """
    rows, listed = evaluation.rows, picks.tolist()
    inputs = {
        name: [value[row] for row in listed]
        if name in STATE_NAMES and isinstance(value, list)
        else pick_rows(name, value, picks, rows)
        for name, value in evaluation.inputs.items()
    }
    kept = tuple(listed) if evaluation.kept is None else tuple(evaluation.kept[row] for row in listed)
    return replace(evaluation, inputs=inputs, kept=kept)


def stacked_branches(inputs: Mapping[str, Any]) -> int:
    """How many branches of guidance are stacked in a batch: how often the noisy samples repeat in it.

    Args:
        inputs: of a denoiser, by name.
    """
    x = next((inputs[name] for name in STATE_NAMES if name in inputs), next(iter(inputs.values()), None))
    if isinstance(x, list | tuple) and x and all(isinstance(item, Tensor) for item in x):
        if any(item.shape != x[0].shape for item in x):
            return 1
        x = torch.stack(tuple(x))
    if not isinstance(x, Tensor) or not x.ndim:
        return 1
    for count in range(len(x), 1, -1):
        if len(x) % count == 0:
            first, *others = x.chunk(count)
            if all(torch.equal(first, other) for other in others):
                return count
    return 1
