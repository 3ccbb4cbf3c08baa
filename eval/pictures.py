"""Images of the shards as PNG data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
from PIL import Image

from ..samplers.errors import InputError

LONGEST_SIDE = 128  # pixels; larger images are shrunk so that a report stays a few megabytes


@dataclass(frozen=True)
class Picture:
    """One image, ready for ``<img src>``.

    Attributes:
        uri: ``data:image/png;base64,...``.
        width: pixels of the PNG.
        height: pixels of the PNG.
        shrunk: whether it has fewer pixels than the image that was scored.
        condition: the class label it was made for, None when the shards have none.
    """

    uri: str
    width: int
    height: int
    shrunk: bool
    condition: int | None = None


def find_pictures(shards: Path, seeds: Iterable[int], config_hash: str) -> dict[int, Picture]:
    """The images of ``seeds`` that the folder ``shards`` holds, by seed.

    Args:
        shards: folder of one configuration; it may be missing or incomplete.
        seeds: the wanted seeds.
        config_hash: what the header of every shard must state, where it states any.

    Raises:
        InputError: when a shard is corrupted, made by another configuration, or holds no uint8 images.
    """
    wanted = set(seeds)
    found: dict[int, Picture] = {}
    for path in sorted(shards.glob("shard-*.safetensors")):
        if wanted <= found.keys():
            break
        found |= _from_shard(path, wanted, config_hash)
    return found


def _from_shard(path: Path, wanted: set[int], config_hash: str) -> dict[int, Picture]:
    mend = "delete it and run fewstep bench again"
    try:
        with safetensors.safe_open(path, "np") as shard:
            stated = (shard.metadata() or {}).get("config_hash", config_hash)
            if stated != config_hash:
                raise InputError(f"{path} is of configuration {stated[:16]!r}, not {config_hash[:16]!r}; {mend}")
            seeds: list[int] = shard.get_tensor("seeds").tolist()
            rows = [(row, seed) for row, seed in enumerate(seeds) if seed in wanted]
            labels = shard.get_tensor("conditions").tolist() if "conditions" in shard.keys() else []  # noqa: SIM118
            images = shard.get_slice("images")
            return {
                seed: picture(images[row : row + 1][0], path, int(labels[row]) if len(labels) > row else None)
                for row, seed in rows
            }
    except (safetensors.SafetensorError, OSError, IndexError) as error:
        raise InputError(f"{path} is corrupted ({error}); {mend}") from None


def picture(image_CHW: np.ndarray, source: Path, condition: int | None = None) -> Picture:
    """One uint8 image of 1, 3 or 4 channels as PNG, exact up to ``LONGEST_SIDE`` pixels and shrunk above."""
    if image_CHW.ndim != 3 or image_CHW.dtype != np.uint8 or image_CHW.shape[0] not in (1, 3, 4):
        raise InputError(
            f"{source} holds {image_CHW.dtype} images of shape {image_CHW.shape};"
            " a report shows uint8 (1, 3 or 4, H, W): generate them again"
        )
    image = Image.fromarray(image_CHW[0] if image_CHW.shape[0] == 1 else np.moveaxis(image_CHW, 0, -1))
    shrunk = max(image.size) > LONGEST_SIDE
    if shrunk:
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(uri, image.width, image.height, shrunk, condition)
