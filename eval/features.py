"""Feature networks and the additive statistics of their features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..samplers.errors import InputError
from ..samplers.files import read_tensors, write_tensors
from ..samplers.registry import Registry

_KIND = "fewstep feature statistics 1"


@runtime_checkable
class FeatureNet(Protocol):
    """A network whose output is scored.

    ``fingerprint`` is the sha256 of weights, ``preprocess`` and the type it computes in: two nets with the same
    fingerprint give the same features. A net that also classifies has ``class_logits`` (see `Classifier`).
    """

    @property
    def name(self) -> str:
        """Its name in the registry, such as ``inception``."""

    @property
    def dim(self) -> int:
        """Length of a feature vector."""

    @property
    def channels(self) -> tuple[int, ...]:
        """Numbers of image channels it takes; 1 in a net for colour means that grey is repeated."""

    @property
    def preprocess(self) -> str:
        """What happens to the uint8 image before the first layer, in words."""

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits."""

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 (B, dim), on the CPU, of ``images`` uint8 (B, C, H, W)."""


@runtime_checkable
class Classifier(FeatureNet, Protocol):
    """A feature net that also names the class."""

    def class_logits(self, images: Tensor) -> Tensor:
        """Logits float32 (B, classes) of ``images`` uint8 (B, C, H, W)."""

    def logits_from_features(self, features: Tensor) -> Tensor:
        """The same logits from features that were kept."""


Loader = Callable[[Path | None, bool], FeatureNet]
FEATURE_NETS: Registry[Loader] = Registry("feature net")
"Name to a function of (path or None, download) that loads the net."


def load_feature_net(
    name: str, path: Path | str | None = None, *, device: str | torch.device = "cpu", download: bool = False
) -> FeatureNet:
    """Loads a feature net by name.

    Args:
        name: ``fashion-features``, ``inception``, ``dinov2``, ``clip`` or ``efflite0``.
        path: its folder or file; ``fashion-features`` and ``efflite0`` know their own.
        device: where it computes.
        download: lets the library that owns the weights fetch them into ``path``; never done unasked.

    Raises:
        InputError: for an unknown name, or weights that are missing or of another network.
    """
    from . import nets  # noqa: F401  registers them

    net = FEATURE_NETS[name](None if path is None else Path(path), download)
    move = getattr(net, "to", None)
    moved: FeatureNet = move(device) if move is not None else net
    return moved


def check_features(features: Tensor, what: str = "features") -> Tensor:
    """``features`` (n, d) as float64 on its device (on the CPU when the device has no float64).

    Raises:
        InputError: when it is no floating point matrix, or holds NaN or infinity.
    """
    if not isinstance(features, Tensor) or not features.is_floating_point() or features.dim() != 2:
        got = f"{features.dtype} {tuple(features.shape)}" if isinstance(features, Tensor) else type(features)
        raise InputError(f"{what} must be a floating point tensor (n, d); got {got}")
    if features.shape[0] == 0 or features.shape[1] == 0:
        raise InputError(f"{what} are empty: shape {tuple(features.shape)}")
    bad = ~torch.isfinite(features).all(1)
    if bad.any():
        raise InputError(
            f"{what} of {int(bad.sum())} of {len(bad)} images hold NaN or infinity "
            f"(first: row {int(bad.nonzero()[0])}); look at these images before scoring"
        )
    return (features.cpu() if features.device.type == "mps" else features).detach().double()


@dataclass(frozen=True, eq=False)
class FeatureStats:
    """Sums over n feature vectors; ``a + b`` merges shards, ``a - b`` takes a block out again.

    Args:
        n: number of images.
        sum: float64 (d,), sum of the features.
        outer: float64 (d, d), sum of the outer products.
        fingerprint: that of the net; statistics of different nets never meet.
    """

    n: int
    sum: Tensor
    outer: Tensor
    fingerprint: str

    def __post_init__(self) -> None:
        d = self.sum.numel()
        if self.sum.shape != (d,) or self.outer.shape != (d, d):
            shapes = f"{tuple(self.sum.shape)} and {tuple(self.outer.shape)}"
            raise InputError(f"statistics must have shapes (d,) and (d, d); got {shapes}")
        if self.sum.dtype != torch.float64 or self.outer.dtype != torch.float64:
            raise InputError(f"statistics must be float64; got {self.sum.dtype} and {self.outer.dtype}")
        if self.n < 1:
            raise InputError(f"statistics need at least one image; got n = {self.n}")
        if not (torch.isfinite(self.sum).all() and torch.isfinite(self.outer).all()):
            raise InputError("statistics hold NaN or infinity; compute them again from finite features")

    @classmethod
    def from_features(cls, features: Tensor, *, fingerprint: str) -> FeatureStats:
        """Sums of ``features`` (n, d), accumulated in float64.

        Raises:
            InputError: for NaN, infinity or a wrong shape.
        """
        x = check_features(features)
        return cls(len(x), x.sum(0).cpu(), (x.T @ x).cpu(), fingerprint)

    @classmethod
    def from_mu_sigma(cls, mu: Tensor, sigma: Tensor, *, n: int, fingerprint: str) -> FeatureStats:
        """From a mean (d,) and an unbiased covariance (d, d), such as clean-fid's reference statistics."""
        mu, sigma = mu.double(), sigma.double()
        return cls(n, n * mu, (n - 1) * sigma + n * torch.outer(mu, mu), fingerprint)

    def __len__(self) -> int:
        return self.n

    def __add__(self, other: FeatureStats) -> FeatureStats:
        self.check_same_net(other)
        return FeatureStats(self.n + other.n, self.sum + other.sum, self.outer + other.outer, self.fingerprint)

    def __sub__(self, other: FeatureStats) -> FeatureStats:
        """The statistics without the images of ``other``, which must be among these."""
        self.check_same_net(other)
        return FeatureStats(self.n - other.n, self.sum - other.sum, self.outer - other.outer, self.fingerprint)

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return self.sum.numel()

    @cached_property
    def mean(self) -> Tensor:
        """float64 (d,)."""
        return self.sum / self.n

    @cached_property
    def cov(self) -> Tensor:
        """Unbiased covariance (divisor n - 1), float64 (d, d)."""
        if self.n < 2:
            raise InputError(f"a covariance needs at least 2 images; got {self.n}")
        centred = self.outer - self.n * torch.outer(self.mean, self.mean)
        return (centred + centred.T) / (2 * (self.n - 1))

    @cached_property
    def root(self) -> Tensor:
        """Symmetric square root of the covariance, float64 (d, d); kept, as a reference meets many methods."""
        values, vectors = torch.linalg.eigh(self.cov)
        root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        return root

    def check_same_net(self, other: FeatureStats) -> None:
        """Raises ``InputError`` when ``other`` comes from another net."""
        if self.fingerprint != other.fingerprint:
            raise InputError(
                f"statistics of different feature nets cannot be compared: {_short(self.fingerprint)} and "
                f"{_short(other.fingerprint)}; compute one of them again with the net of the other"
            )
        if self.dim != other.dim:
            raise InputError(f"statistics of {self.dim} and {other.dim} dimensions cannot be compared")

    def save(self, path: Path | str) -> None:
        """Writes a safetensors file, atomically."""
        header = {"kind": _KIND, "n": str(self.n), "fingerprint": self.fingerprint}
        write_tensors(Path(path), {"sum": self.sum, "outer": self.outer}, header)

    @classmethod
    def load(cls, path: Path | str, fingerprint: str | None = None) -> FeatureStats:
        """Reads what ``save`` wrote.

        Args:
            path: the file.
            fingerprint: that of the net the statistics will be used with; None takes any.

        Raises:
            InputError: when the file is missing, corrupted, of another kind, or of another net.
        """
        tensors, header = read_tensors(Path(path))
        n = header.get("n", "")
        if header.get("kind") != _KIND or set(tensors) != {"sum", "outer"} or not n.isdigit():
            raise InputError(f"{path} holds no feature statistics; make them with FeatureStats.save")
        own = header.get("fingerprint", "")
        if fingerprint is not None and own != fingerprint:
            raise InputError(
                f"{path} holds statistics of the feature net {_short(own)}, not of {_short(fingerprint)}; "
                "compute them again with this net"
            )
        return cls(int(n), tensors["sum"], tensors["outer"], own)


def metric_name(net: str, n: int, dim: int, kind: str = "fd") -> str:
    """The name of a score, such as ``fd_fashion``; ``fid`` and ``kid`` belong to the standard Inception alone.

    Args:
        net: name of the feature net.
        n: number of generated images.
        dim: dimension of the features.
        kind: ``fd`` (Fréchet), ``kd`` (kernel), ``precision`` and so on.

    Raises:
        InputError: for an FID of fewer than two images per dimension, which mostly measures n.
    """
    if net != "inception" or kind not in {"fd", "kd"}:
        return f"{kind}_{net.removesuffix('-features')}"
    if kind == "fd" and n < 2 * dim:
        raise InputError(
            f"fid needs at least {2 * dim} images (twice the {dim} dimensions); got {n}: "
            "use kid, which is unbiased, or generate more"
        )
    return {"fd": "fid", "kd": "kid"}[kind]


def _short(fingerprint: str) -> str:
    return fingerprint[:16] or "(none)"
