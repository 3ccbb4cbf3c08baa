"""From what a sample is of to how many steps it gets: a table by class, or a small network over an embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from .errors import InputError
from .files import read_tensors, write_tensors

SHAPES = {
    "mean": ("features",),
    "std": ("features",),
    "hidden.weight": ("hidden", "features"),
    "hidden.bias": ("hidden",),
    "out.weight": ("choices", "hidden"),
    "out.bias": ("choices",),
}
"Tensors of a policy network, and what their dimensions are."


def label_keys(values: Any) -> list[str]:
    """Entries of a condition as a table's keys: numbers as whole numbers, text as it is."""
    if isinstance(values, Tensor):
        values = values.reshape(-1).tolist()
    if isinstance(values, str | int):
        values = [values]
    return [value if isinstance(value, str) else str(int(value)) for value in values]


def embedding_features(values: Any) -> Tensor:
    """Embeddings as features, (B, D) float32 on the CPU: the mean over tokens, padding included.

    Args:
        values: (B, D), (B, tokens, D), or a list of (tokens, D).

    Raises:
        InputError: when they are none of them.
    """
    if isinstance(values, list | tuple) and all(isinstance(value, Tensor) and value.ndim == 2 for value in values):
        return torch.stack([value.detach().float().mean(0) for value in values]).cpu()
    if not isinstance(values, Tensor) or values.ndim not in (2, 3):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"a policy looks at embeddings (B, D) or (B, tokens, D); got {got}")
    features = values.detach().float()
    return (features.mean(1) if features.ndim == 3 else features).cpu()


def policy_logits(tensors: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """What the policy network says, (B, choices): one hidden layer with SiLU over standardised features.

    Args:
        tensors: its weights, as in `SHAPES`.
        features: (B, D) float32.
    """
    standard = (features - tensors["mean"]) / tensors["std"]
    hidden = silu(linear(standard, tensors["hidden.weight"], tensors["hidden.bias"]))
    return linear(hidden, tensors["out.weight"], tensors["out.bias"])


def write_policy(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a policy network as safetensors."""
    write_tensors(path, {name: tensors[name].detach().float().cpu() for name in SHAPES})


def read_policy(path: Path, choices: int) -> dict[str, Tensor]:
    """Reads a policy network, float32.

    Args:
        path: a safetensors file.
        choices: how many outputs it must have.

    Raises:
        InputError: when it is not one.
    """
    tensors, _ = read_tensors(path)
    if tensors.keys() != SHAPES.keys():
        raise InputError(f"{path} is no policy; it has tensors {sorted(tensors)} and needs {sorted(SHAPES)}")
    sizes = {"choices": choices}
    for name, dimensions in SHAPES.items():
        expected = tuple(sizes.setdefault(d, n) for d, n in zip(dimensions, tensors[name].shape, strict=False))
        if tuple(tensors[name].shape) != expected or len(expected) != len(dimensions):
            raise InputError(f"{path}: {name} is {tuple(tensors[name].shape)}; needed {dimensions} with {sizes}")
    return {name: tensor.float() for name, tensor in tensors.items()}


def table_choices(table: Mapping[str, Sequence[float]], keys: Sequence[str]) -> list[int]:
    """The likeliest choice for each key.

    Raises:
        InputError: when a key is not in the table.
    """
    for key in keys:
        if key not in table:
            raise InputError(f"the adaptive-steps policy has no entry for {key!r}; it knows {', '.join(table)}")
    return [max(range(len(table[key])), key=table[key].__getitem__) for key in keys]
