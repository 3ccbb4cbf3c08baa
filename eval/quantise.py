"""The one rounding quantiser: only its ``uint8`` output is ever scored."""

from __future__ import annotations

import torch
from torch import Tensor

from ..samplers.errors import InputError

_OVERSHOOT = 0.5
"How far a decoder may overshoot [0, 1] before the images are taken to be in another range altogether."


def to_uint8(images_01: Tensor) -> Tensor:
    """Clamps to [0, 1] and rounds to the nearest of 256 levels, ties to even.

    This is what ``diffusers`` and ``torchvision`` do when they save a picture. Truncation, as in several research
    scripts, shifts every image by half a grey level.

    Args:
        images_01: floating point (B, C, H, W) in [0, 1]; an overshoot of a decoder is clamped.

    Returns:
        uint8 (B, C, H, W) on the same device.

    Raises:
        InputError: for another type or shape, NaN or infinity, or values that are plainly of another range.
    """
    if not isinstance(images_01, Tensor) or not images_01.is_floating_point():
        raise InputError(f"images must be a floating point tensor in [0, 1]; got {_kind(images_01)}")
    if images_01.dim() != 4 or images_01.numel() == 0:
        raise InputError(f"images must have shape (B, C, H, W); got {tuple(images_01.shape)}")
    bad = ~torch.isfinite(images_01).flatten(1).all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise InputError(
            f"{int(bad.sum())} of {len(bad)} images hold NaN or infinity (first: image {first}); "
            "sample them again in float32 or bfloat16"
        )
    low, high = images_01.min().item(), images_01.max().item()
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        raise InputError(f"images must lie in [0, 1]; got [{low:.4g}, {high:.4g}]: rescale or clamp them first")
    exact = images_01 if images_01.dtype == torch.float64 else images_01.float()
    return (exact.clamp(0, 1) * 255).round().to(torch.uint8)


def check_uint8(images: Tensor, channels: tuple[int, ...] | None = None) -> None:
    """Raises ``InputError`` unless ``images`` is uint8 (B, C, H, W), not empty, with C among ``channels``."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise InputError(f"only uint8 images are scored; got {_kind(images)}: use to_uint8 first")
    if images.dim() != 4 or images.numel() == 0:
        raise InputError(f"images must have shape (B, C, H, W); got {tuple(images.shape)}")
    if channels is not None and images.shape[1] not in channels:
        wanted = " or ".join(map(str, channels))
        raise InputError(f"images must have {wanted} channels; got {images.shape[1]} in {tuple(images.shape)}")


def as_rgb(images: Tensor) -> Tensor:
    """``images`` (B, 1 or 3, H, W) with three channels; grey is repeated.

    Raises:
        InputError: for another number of channels.
    """
    check_uint8(images, (1, 3))
    return images.expand(-1, 3, -1, -1)


def _kind(value: object) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
