"""The demo's classifier as feature net ``fashion-features`` (metrics ``fd_fashion`` and so on)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ...samplers.errors import InputError
from ...samplers.files import read_json, read_tensors
from ..features import FEATURE_NETS
from ..quantise import check_uint8
from .fashion import FashionNet
from .module_net import ModuleNet

SHIPPED = Path(__file__).parents[1] / "demo" / "fashion-features"
"Folder of the weights that come with fewstep."


class FashionFeatures(ModuleNet):
    """`FashionNet` with its classes."""

    def class_logits(self, images: Tensor) -> Tensor:
        """Logits float32 (B, 10) of ``images`` uint8 (B, 1, 32, 32)."""
        return self.logits_from_features(self(images))

    @torch.no_grad()
    def logits_from_features(self, features: Tensor) -> Tensor:
        """The same logits from features (B, dim) that were kept."""
        head = self.module.head
        if not isinstance(head, nn.Linear) or features.shape[1:] != (head.in_features,):
            raise InputError(f"{self.name} has features of {self.dim} numbers; got shape {tuple(features.shape)}")
        return head(features.float().to(head.weight.device)).cpu()  # type: ignore[no-any-return]


@FEATURE_NETS.register("fashion-features")
def load(path: Path | None, download: bool = False) -> FashionFeatures:
    """The net of the folder ``path`` (``config.json`` and ``model.safetensors``), or the one that ships."""
    folder = path or SHIPPED
    config = read_json(folder / "config.json")
    weights, _ = read_tensors(folder / "model.safetensors")
    try:
        net = FashionNet(tuple(config["widths"]), config["classes"])
        net.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{folder} is no fashion-features folder; config.json must name the widths and classes of model.safetensors"
        ) from None
    return FashionFeatures(
        name="fashion-features",
        dim=net.head.in_features,
        channels=(1,),
        preprocess="1x32x32; u8 / 127.5 - 1",
        module=net,
        prepare=_prepare,
        embed=_embed,
    )


def _prepare(images: Tensor) -> Tensor:
    check_uint8(images, (1,))
    if images.shape[2:] != (32, 32):
        raise InputError(f"fashion-features takes 1x32x32 images; got {tuple(images.shape[1:])}")
    return images.float().div_(127.5).sub_(1)


def _embed(module: nn.Module, x: Tensor) -> Tensor:
    features: Tensor = module(x)[0]
    return features
