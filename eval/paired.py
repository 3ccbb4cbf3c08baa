"""Scores of an image against the teacher's image of the same seed, one number per pair."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..samplers.errors import InputError
from ..samplers.files import read_tensors
from .features import check_features
from .quantise import as_rgb, check_uint8


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair, in dB, data range 255.

    Equal images would be infinite; they get the value of a single pixel that is one level off, the smallest
    difference there is, so that means stay finite and the order is kept.

    Args:
        images: uint8 (B, C, H, W).
        reference: the same shape.

    Returns:
        float64 (B,).
    """
    _check_pair(images, reference)
    squares = (images.double() - reference.double()).square().flatten(1)
    return 10 * torch.log10(255**2 / squares.mean(1).clamp(min=1 / squares.shape[1]))


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each pair (Wang et al. 2004), by torchmetrics: Gaussian window of sigma 1.5, 255.

    Args:
        images: uint8 (B, C, H, W), at least 11 pixels a side.
        reference: the same shape.

    Returns:
        float64 (B,), at most 1.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair(images, reference)
    if min(images.shape[2:]) < 11:
        raise InputError(f"SSIM needs images of at least 11 pixels a side; got {tuple(images.shape[2:])}")
    values: Tensor = structural_similarity_index_measure(
        images.double(), reference.double(), data_range=255.0, sigma=1.5, reduction="none"
    )
    return values.reshape(len(images))


def feature_distance(features: Tensor, reference: Tensor) -> Tensor:
    """Euclidean distance of each pair of feature vectors (B, d), float64 (B,)."""
    x, y = check_features(features), check_features(reference, "reference features")
    if x.shape != y.shape:
        raise InputError(f"paired features must have equal shapes; got {tuple(x.shape)} and {tuple(y.shape)}")
    distances: Tensor = torch.linalg.vector_norm(x - y.to(x.device), dim=1)
    return distances


class Lpips:
    """LPIPS (arXiv:1801.03924) by torchmetrics, with a backbone of your own copy.

    The linear heads come with torchmetrics. The backbone is torchvision's, saved once as
    ``save_file(torchvision.models.alexnet(weights="DEFAULT").state_dict(), "alexnet.safetensors")``;
    nothing is downloaded here.

    ``fingerprint`` is the sha256 of that file.

    Args:
        path: safetensors file of the backbone.
        net: which backbone it is: ``alex`` (AlexNet), ``vgg`` (VGG16) or ``squeeze`` (SqueezeNet 1.1).

    Raises:
        InputError: when the file is missing, a pickle, or of another network.
    """

    def __init__(self, path: Path | str | None, net: Literal["alex", "vgg", "squeeze"] = "alex") -> None:
        from torchmetrics.functional.image.lpips import _LPIPS

        if path is None:
            raise InputError(
                "lpips needs the weights of its backbone; give the path of a safetensors file of torchvision's "
                f"{net} network, or leave lpips out"
            )
        tensors, _ = read_tensors(Path(path))
        self.fingerprint = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        self._net: nn.Module = _LPIPS(pretrained=True, net=net, pnet_rand=True)
        backbone: Any = self._net.net
        # torchmetrics cuts torchvision's `features` into slices and keeps the numbers of the layers.
        names = {key: re.sub(r"^slices?\.?\d+\.", "features.", key) for key in backbone.state_dict()}
        try:
            backbone.load_state_dict({key: tensors[name] for key, name in names.items()})
        except (KeyError, RuntimeError):
            raise InputError(
                f"{path} does not hold torchvision's {net} network; see fewstep.eval.paired.Lpips"
            ) from None

    @torch.no_grad()
    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        """LPIPS of each pair of uint8 (B, C, H, W), float64 (B,); grey is repeated to three channels."""
        _check_pair(images, reference)
        x, y = (as_rgb(batch).float() / 127.5 - 1 for batch in (images, reference))
        distances: Tensor = self._net(x, y)
        return distances.flatten().double()


def _check_pair(images: Tensor, reference: Tensor) -> None:
    check_uint8(images)
    check_uint8(reference)
    if images.shape != reference.shape:
        shapes = f"{tuple(images.shape)} and {tuple(reference.shape)}"
        raise InputError(f"paired images must have equal shapes; got {shapes}")
