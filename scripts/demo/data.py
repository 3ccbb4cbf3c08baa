"""Fashion-MNIST (Xiao et al., arXiv:1708.07747) as 32x32 tensors."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor

DEFAULT_DATA = Path("/usr/share/datasets/fashion-mnist")
"Where Debian's package ``dataset-fashion-mnist`` puts its files."

CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"Names of the labels 0 to 9."

_PREFIX = {"train": "train", "test": "t10k"}


def load_fashion(split: str, folder: Path = DEFAULT_DATA) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, 1, 32, 32), zero-padded by two pixels a side, and labels int64 (n,).

    Args:
        split: ``"train"`` (60,000) or ``"test"`` (10,000).
        folder: folder with the four ``*-ubyte.gz`` files of the data set.

    Raises:
        FileNotFoundError: when a file is missing, with where to get it.
    """
    images = _read_idx(folder / f"{_PREFIX[split]}-images-idx3-ubyte.gz")
    labels = _read_idx(folder / f"{_PREFIX[split]}-labels-idx1-ubyte.gz")
    return torch.nn.functional.pad(images, (2, 2, 2, 2)).unsqueeze(1), labels.long()


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1], the range the networks work in."""
    return images.float().div_(127.5).sub_(1.0)


def _read_idx(path: Path) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; install Debian's package dataset-fashion-mnist, or give the folder of "
            "torchvision's download (FashionMNIST/raw) with --data"
        )
    with gzip.open(path, "rb") as stream:
        dims = struct.unpack(">4B", stream.read(4))[3]
        shape = struct.unpack(f">{dims}I", stream.read(4 * dims))
        return torch.frombuffer(bytearray(stream.read()), dtype=torch.uint8).reshape(shape)
