"""Parts of a pipeline that a training does not need, out of the accelerator's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..samplers import denoisers


def idle_parts(pipe: Any, encodes: bool) -> list[nn.Module]:
    """The networks of a pipeline that only its own sampling needs.

    Args:
        pipe: a diffusers pipeline.
        encodes: whether prompts are still encoded while it trains; then its text encoders are needed.
    """
    networks = set(map(id, denoisers(pipe).values()))
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return [
        part
        for name, part in parts.items()
        if id(part) not in networks and (not encodes or name in ("vae", "safety_checker", "image_encoder"))
    ]


@contextmanager
def placed(parts: Sequence[nn.Module], device: torch.device, back: torch.device) -> Iterator[None]:
    """Parts on ``device`` until the block ends, and then on ``back``; nothing moves where these are the same."""
    if device == back:
        yield
        return
    _move(parts, device)
    try:
        yield
    finally:
        _move(parts, back)


def _move(parts: Sequence[nn.Module], device: torch.device) -> None:
    for part in parts:
        nn.Module.to(part, device)  # diffusers' own warns of half precision
    if device.type == "cpu" and torch.accelerator.is_available():
        torch.get_device_module().empty_cache()
