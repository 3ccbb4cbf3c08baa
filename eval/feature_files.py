"""Features of shards as files, so that a shard is looked at once by each network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..samplers.errors import InputError
from ..samplers.files import read_tensors, write_tensors
from .features import FeatureNet
from .generate import ImageSet, Shard

CHUNK = 64
"Images in one pass of a feature network; fixed, so that features never depend on the batch size of sampling."


def features_of(images: ImageSet, net: FeatureNet, out: Path) -> Tensor:
    """Features float32 (n, dim) of a set of images in the order of their seeds, from files where they are.

    Args:
        images: complete set.
        net: the network.
        out: folder of the bench; files go to OUT/features/<config_hash>/<first 16 digits of the fingerprint>.

    Raises:
        InputError: for a damaged file, or one of other images or another network.
    """
    folder = out / "features" / images.config_hash / net.fingerprint[:16]
    return torch.cat([_of_shard(shard, images, net, folder) for shard in images.shards()])


def _of_shard(shard: Shard, images: ImageSet, net: FeatureNet, folder: Path) -> Tensor:
    path = folder / images.path(shard.index).name
    header = {"config_hash": images.config_hash, "net": net.name, "fingerprint": net.fingerprint}
    if path.is_file():
        kept = _read(path, header, shard, net)
        if kept is not None:
            return kept
    features = embed(net, shard.images)
    write_tensors(path, {"features": features, "seeds": shard.seeds}, header)
    return features


def _read(path: Path, header: dict[str, str], shard: Shard, net: FeatureNet) -> Tensor | None:
    """Kept features of a shard; None when it has grown since."""
    tensors, found = read_tensors(path)
    features, seeds = tensors.get("features"), tensors.get("seeds")
    if found != header or features is None or seeds is None or features.shape != (len(seeds), net.dim):
        raise InputError(f"{path} holds no features of these images by {net.name}; delete it and run again")
    if len(seeds) < len(shard.seeds):
        return None
    if not torch.equal(seeds[: len(shard.seeds)], shard.seeds):
        raise InputError(f"{path} holds features of other seeds; delete it and run again")
    return features[: len(shard.seeds)]


def embed(net: FeatureNet, images: Tensor) -> Tensor:
    """Features float32 (n, dim) of ``images`` uint8 (n, C, H, W), a chunk at a time."""
    return torch.cat([net(images[first : first + CHUNK]) for first in range(0, len(images), CHUNK)])
