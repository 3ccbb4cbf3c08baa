"""A torch module as feature net: the frame that all the nets here share."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...samplers.errors import InputError
from ..quantise import as_rgb, check_uint8

GREY = "grey repeated to 3 channels"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class ModuleNet:
    """A `FeatureNet` of a module that computes in float32.

    Args:
        name: the net's name in the registry.
        dim: length of a feature vector.
        channels: numbers of image channels it takes.
        preprocess: what ``prepare`` does, in words; part of the fingerprint.
        module: the network, in evaluation mode.
        prepare: uint8 (B, C, H, W) to the module's float32 input, on the CPU or the images' device.
        embed: module and prepared images to features (B, dim).
    """

    name: str
    dim: int
    channels: tuple[int, ...]
    preprocess: str
    module: nn.Module
    prepare: Callable[[Tensor], Tensor]
    embed: Callable[[nn.Module, Tensor], Tensor]

    def __post_init__(self) -> None:
        self.module.eval().requires_grad_(False)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the preprocessing, the type float32, and every weight with its name and shape."""
        digest = hashlib.sha256(f"{self.preprocess}\nfloat32\n".encode())
        for key, value in sorted(self.module.state_dict().items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def to(self, device: str | torch.device) -> Self:
        """The same net computing on ``device``."""
        return dataclasses.replace(self, module=self.module.to(device))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 (B, dim), on the CPU, of ``images`` uint8 (B, C, H, W)."""
        check_uint8(images, self.channels)
        parameter = next(self.module.parameters())
        with _full_float32(parameter.device.type):
            features = self.embed(self.module, self.prepare(images).to(parameter.device))
        if features.shape != (len(images), self.dim):
            raise InputError(f"{self.name} must give features {(len(images), self.dim)}; got {features.shape}")
        return features.float().cpu()


@contextmanager
def _full_float32(device_type: str) -> Iterator[None]:
    """No autocast and no TF32, which would make the features depend on the caller and the GPU."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def bicubic(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Callable[[Tensor], Tensor], str]:
    """Preprocessing of most networks, and its words.

    Resizes to ``size`` x ``size`` in float with an antialiased bicubic filter (Pillow's and clean-fid's, to
    rounding), clamps to [0, 255], scales to [0, 1], subtracts ``mean`` and divides by ``std``.
    """

    def prepare(images: Tensor) -> Tensor:
        x = as_rgb(images).float()
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 255) / 255
        shift, scale = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (mean, std))
        return (x - shift) / scale

    return prepare, f"{GREY}; bicubic antialias float {size}x{size}; [0, 1]; mean {mean} std {std}"
