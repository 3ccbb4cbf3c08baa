"""Real images, as the statistics and features that generated ones are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..samplers.errors import InputError
from ..samplers.files import read_tensors, write_tensors
from .assets import DEMO
from .distances import frechet_distance
from .feature_files import CHUNK
from .features import FeatureNet, FeatureStats, metric_name
from .record import Floor, digest

KEPT_FEATURES = 5000
"Real images whose features are kept one by one, for the kernel distance and the manifold scores."

STATS_FILE, FEATURES_FILE = "stats.safetensors", "real.safetensors"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class RealImages:
    """What is known of the real images.

    Attributes:
        name: in words, for the records.
        key: hash of what scores depend on.
        stats: moments of the features.
        features: float32 (m, dim) of some of the images, None where only moments are known.
        floor: what other real images score against these.
        warnings: what the reader of a score should know.
    """

    name: str
    key: str
    stats: FeatureStats
    features: Tensor | None
    floor: dict[str, Floor]
    warnings: tuple[str, ...] = ()


def demo_images(net: FeatureNet) -> RealImages:
    """Fashion-MNIST's 60,000 training images; its 10,000 test images give the floor."""
    folder = DEMO / "fashion-features"
    train = FeatureStats.load(folder / "train.safetensors", net.fingerprint)
    test = FeatureStats.load(folder / "test.safetensors", net.fingerprint)
    floor = {metric_name(net.name, test.n, net.dim): Floor(frechet_distance(test, train), test.n)}
    features = _read_features(folder / FEATURES_FILE, net)
    return RealImages(f"{train.n:,} training images of Fashion-MNIST", _key(train, features), train, features, floor)


def stored_images(path: Path, net: FeatureNet) -> RealImages:
    """Statistics that were made before.

    Args:
        path: a folder that `folder_images` wrote, a file of `FeatureStats.save`, or an ``.npz`` file with ``mu`` and
            ``sigma`` as clean-fid and pytorch-fid write them.
        net: the network they must be of.

    Raises:
        InputError: when there is nothing of the kind, or it is of another network.
    """
    if path.is_dir():
        stats = FeatureStats.load(path / STATS_FILE, net.fingerprint)
        features = _read_features(path / FEATURES_FILE, net)
        return RealImages(f"{stats.n:,} images of {path.name}", _key(stats, features), stats, features, {})
    if path.suffix == ".npz":
        stats = _moments(path, net)
        note = f"{path.name} does not say which network and how many images it is of; they are taken to match"
        return RealImages(f"statistics {path.name}", _key(stats, None), stats, None, {}, (note,))
    stats = FeatureStats.load(path, net.fingerprint)
    return RealImages(f"{stats.n:,} images of {path.stem}", _key(stats, None), stats, None, {})


def folder_images(folder: Path, net: FeatureNet, out: Path) -> RealImages:
    """Statistics of a folder of pictures, made once and kept in ``OUT/reference``.

    Args:
        folder: pictures in any depth; grey ones and coloured ones must not be mixed.
        net: the network.
        out: folder of the bench.

    Raises:
        InputError: for a folder without pictures, or a picture that cannot be read.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise InputError(f"--reference_images {folder} holds {len(files)} pictures; give a folder of real images")
    listing = [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    kept = out / "reference" / digest([net.fingerprint, listing])
    if not (kept / STATS_FILE).is_file():
        features = torch.cat([net(batch) for batch in _batches(files)])
        chosen = torch.linspace(0, len(files) - 1, min(KEPT_FEATURES, len(files)), dtype=torch.float64).round().long()
        write_tensors(kept / FEATURES_FILE, {"features": features[chosen]}, {"fingerprint": net.fingerprint})
        FeatureStats.from_features(features, fingerprint=net.fingerprint).save(kept / STATS_FILE)
    stats = FeatureStats.load(kept / STATS_FILE, net.fingerprint)
    real = _read_features(kept / FEATURES_FILE, net)
    jpegs = sum(path.suffix.lower() in {".jpg", ".jpeg", ".webp"} for path in files)
    notes = (f"{jpegs} of {len(files)} real images are stored lossily, which moves every distance",) if jpegs else ()
    return RealImages(f"{stats.n:,} images of {folder.name}", _key(stats, real), stats, real, {}, notes)


def _batches(files: list[Path]) -> Iterator[Tensor]:
    """Pictures uint8 (B, C, H, W) in order, neighbours of equal shape together."""
    batch: list[Tensor] = []
    for path in files:
        picture = _read_picture(path)
        if batch and (len(batch) == CHUNK or batch[0].shape != picture.shape):
            yield torch.stack(batch)
            batch = []
        batch.append(picture)
    yield torch.stack(batch)


def _read_picture(path: Path) -> Tensor:
    try:
        with Image.open(path) as picture:
            array = np.array(picture if picture.mode == "L" else picture.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{path} cannot be read as a picture ({error}); delete or replace it") from None
    return torch.from_numpy(array).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def _read_features(path: Path, net: FeatureNet) -> Tensor:
    tensors, header = read_tensors(path)
    features = tensors.get("features")
    if features is None or features.ndim != 2 or features.shape[1] != net.dim:
        raise InputError(f"{path} holds no features of {net.name}; make it again")
    if header.get("fingerprint") != net.fingerprint:
        raise InputError(f"{path} holds features of other weights of {net.name}; make it again with this network")
    return features


def _moments(path: Path, net: FeatureNet) -> FeatureStats:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mu, sigma = (torch.from_numpy(np.asarray(arrays[key])) for key in ("mu", "sigma"))
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} holds no mu and sigma ({error}); give statistics as clean-fid writes them") from None
    if mu.shape != (net.dim,) or sigma.shape != (net.dim, net.dim):
        raise InputError(f"{path} holds statistics of {tuple(mu.shape)} features, {net.name} has {net.dim}")
    return FeatureStats.from_mu_sigma(mu, sigma, n=10 * net.dim, fingerprint=net.fingerprint)


def _key(stats: FeatureStats, features: Tensor | None) -> str:
    sums = [stats.sum.sum().item(), stats.outer.sum().item()]
    return digest([stats.fingerprint, stats.n, sums, None if features is None else features.double().sum().item()])
