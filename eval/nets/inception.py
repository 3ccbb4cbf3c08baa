"""The standard Inception of FID, by clean-fid: its weights, its resize, its loader."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...samplers.errors import InputError
from ..features import FEATURE_NETS
from ..quantise import as_rgb
from .module_net import GREY, ModuleNet

FILE = "inception-2015-12-05.pt"
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"Digest of NVIDIA's TorchScript file, which clean-fid uses. Another network must not be called FID."

PREPROCESS = f"{GREY}; clean-fid clean: PIL bicubic float 299x299 per channel, clipped; (x - 128) / 128"


@FEATURE_NETS.register("inception")
def load(path: Path | None, download: bool = False) -> ModuleNet:
    """Loads clean-fid's Inception from a local file or folder.

    TorchScript is a program: the file is read by clean-fid itself, and only after its sha256 was checked.

    Args:
        path: folder with ``inception-2015-12-05.pt``, or that file.
        download: lets clean-fid fetch the file (91 MB) into the folder when it is missing.

    Raises:
        InputError: when the file is missing or is not the standard one.
    """
    from cleanfid.downloads_helper import check_download_inception, inception_url
    from cleanfid.inception_torchscript import InceptionV3W

    if path is None:
        raise InputError(
            f"inception needs the path of {FILE}; get it from {inception_url}, or give a folder and download=True"
        )
    folder = path.parent if path.name == FILE else path
    file = folder / FILE
    if download and not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        check_download_inception(str(folder))
    if not file.is_file():
        raise InputError(f"{file} does not exist; get it from {inception_url}, or load with download=True")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != SHA256:
        raise InputError(
            f"{file} is not the standard Inception (sha256 {digest[:16]}, not {SHA256[:16]}); "
            f"get it from {inception_url}"
        )
    return from_module(InceptionV3W(str(folder), download=False))


def from_module(module: nn.Module) -> ModuleNet:
    """The feature net around a module that takes float32 (B, 3, 299, 299) in [0, 255]."""
    return ModuleNet("inception", 2048, (1, 3), PREPROCESS, module, clean_resize, lambda net, x: net(x))


def clean_resize(images: Tensor) -> Tensor:
    """``images`` uint8 (B, C, H, W) to float32 (B, 3, 299, 299) in [0, 255], by clean-fid's own resizer."""
    from cleanfid.resize import make_resizer

    resize = make_resizer("PIL", False, "bicubic", (299, 299))
    resized = [resize(image.permute(1, 2, 0).numpy()) for image in as_rgb(images).cpu()]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
