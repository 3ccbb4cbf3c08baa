"""Every metric that a bench can compute, one entry each: what it needs and how it is estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .clipscore import ClipScore
from .conditions import Conditions
from .distances import frechet_jackknife, kernel_jackknife
from .features import FeatureNet, FeatureStats
from .generate import SHARD_SIZE
from .jackknife import BLOCKS, Estimate, Jackknife, block_slices, mean_estimate, mean_jackknife
from .manifold import ManifoldScores, manifold_scores
from .paired import Lpips, feature_distance, psnr, ssim
from .reference import RealImages
from .vendi import vendi_jackknife

Need = Literal["net", "real", "moments", "samples", "classes", "clip", "lpips"]

WHY_NOT: dict[Need, str] = {
    "net": "it needs a feature network, see --net",
    "real": "it needs real images, see --reference_images and --reference_stats",
    "moments": "a Fréchet distance needs n of at least twice the dimensions of the features",
    "samples": "it needs the features of single real images, see --reference_images",
    "classes": "it needs a network that names classes, and class labels",
    "clip": "it needs prompts and a CLIP folder, see --clip_path",
    "lpips": "it needs the weights of its backbone, see --lpips_path",
}
"What to say when a need is not met."


class Images(Protocol):
    """Images in the order of their seeds: files, as in `ImageSet`, or tensors, as in `HeldImages`."""

    @property
    def seeds(self) -> range:
        """One for each image."""

    def batches(self) -> Iterator[Tensor]:
        """All images in order, uint8 (B, C, H, W)."""


@dataclass(frozen=True, eq=False)
class HeldImages:
    """Images in memory.

    Attributes:
        seeds: one for each image.
        images: uint8 (n, C, H, W); None where only their features were kept.
    """

    seeds: range
    images: Tensor | None

    def batches(self) -> Iterator[Tensor]:
        """All images in order, uint8 (B, C, H, W)."""
        yield from torch.split(needed(self.images), SHARD_SIZE)


@dataclass(frozen=True)
class Sample:
    """Images that are judged, and what they are judged with; a metric sees only what it needs.

    Attributes:
        images: a complete set.
        conditions: what the images were to show.
        vectors: features float32 (n, dim), None without a network.
        net: the network.
        real: real images.
        clip: for CLIPScore.
        lpips: for LPIPS.
        reference: the reference row on the same seeds, None when this is it.
    """

    images: Images
    conditions: Conditions
    vectors: Tensor | None
    net: FeatureNet | None
    real: RealImages | None
    clip: ClipScore | None
    lpips: Lpips | None
    reference: Sample | None

    @property
    def features(self) -> Tensor:
        """Features float32 (n, dim)."""
        vectors: Tensor = needed(self.vectors)
        return vectors

    @property
    def blocks(self) -> int:
        """Blocks of seeds of the jackknife."""
        return min(BLOCKS, len(self.images.seeds) // 2)

    @property
    def parts(self) -> list[Tensor]:
        """The features by blocks of seeds."""
        return [self.features[cut] for cut in block_slices(len(self.features), self.blocks)]

    @cached_property
    def manifold(self) -> ManifoldScores:
        """Precision, recall, density and coverage, computed together."""
        return manifold_scores(needed(needed(self.real).features), self.features, blocks=self.blocks)

    def pairs(self, compare: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``compare`` of the images and the reference's, float64 (n,), a batch at a time."""
        both = zip(self.images.batches(), needed(self.reference).images.batches(), strict=True)
        return torch.cat([compare(ours, theirs) for ours, theirs in both])

    @cached_property
    def feature_distances(self) -> Tensor:
        """Distance to the reference's image of the same seed in feature space, float64 (n,)."""
        return feature_distance(self.features, needed(self.reference).features)


def needed(value: Any) -> Any:
    """``value``, which the needs of the metric promise to be there."""
    assert value is not None
    return value


@dataclass(frozen=True)
class Kind:
    """A metric up to its feature network.

    Attributes:
        estimate: the number and its error; a `Jackknife` can be paired with the reference's.
        higher_is_better: direction.
        needs: what must be there.
        suffixed: whether the name of the network is part of the metric's.
        against: what it compares with.
        least_side: pixels that an image must have a side.
    """

    estimate: Callable[[Sample], Estimate]
    higher_is_better: bool
    needs: tuple[Need, ...] = ()
    suffixed: bool = False
    against: Literal["real", "reference"] | None = None
    least_side: int = 1


def _frechet(sample: Sample) -> Jackknife:
    stats = needed(sample.real).stats
    return frechet_jackknife(
        [FeatureStats.from_features(part, fingerprint=stats.fingerprint) for part in sample.parts], stats
    )


def _kernel(sample: Sample) -> Jackknife:
    return kernel_jackknife(sample.parts, needed(needed(sample.real).features))


def _class_accuracy(sample: Sample) -> Jackknife:
    logits: Tensor = needed(sample.net).logits_from_features(sample.features)
    labels = torch.tensor(sample.conditions.codes(sample.images.seeds))
    return mean_jackknife(logits.argmax(1) == labels, sample.blocks)


def _clip_score(sample: Sample) -> Jackknife:
    prompts = sample.conditions.inputs(sample.images.seeds)["prompt"]
    scores = []
    for images in sample.images.batches():
        scores.append(needed(sample.clip).per_image(images, prompts[: len(images)]))
        prompts = prompts[len(images) :]
    return mean_jackknife(torch.cat(scores), sample.blocks)


def _paired(compare: Callable[[Sample], Callable[[Tensor, Tensor], Tensor]]) -> Callable[[Sample], Estimate]:
    return lambda sample: mean_estimate(sample.pairs(compare(sample)))


KINDS: dict[str, Kind] = {
    "fd": Kind(_frechet, False, ("net", "real", "moments"), suffixed=True, against="real"),
    "kd": Kind(_kernel, False, ("net", "real", "samples"), suffixed=True, against="real"),
    "precision": Kind(
        lambda sample: sample.manifold.precision, True, ("net", "real", "samples"), suffixed=True, against="real"
    ),
    "recall": Kind(
        lambda sample: sample.manifold.recall, True, ("net", "real", "samples"), suffixed=True, against="real"
    ),
    "density": Kind(
        lambda sample: sample.manifold.density, True, ("net", "real", "samples"), suffixed=True, against="real"
    ),
    "coverage": Kind(
        lambda sample: sample.manifold.coverage, True, ("net", "real", "samples"), suffixed=True, against="real"
    ),
    "class_accuracy": Kind(_class_accuracy, True, ("net", "classes")),
    "clip_score": Kind(_clip_score, True, ("clip",)),
    "vendi": Kind(lambda sample: vendi_jackknife(sample.features, sample.blocks), True, ("net",), suffixed=True),
    "psnr": Kind(_paired(lambda sample: psnr), True, against="reference"),
    "ssim": Kind(_paired(lambda sample: ssim), True, against="reference", least_side=11),
    "lpips": Kind(_paired(lambda sample: needed(sample.lpips)), False, ("lpips",), against="reference"),
    "feature_distance": Kind(
        lambda sample: mean_estimate(sample.feature_distances), False, ("net",), against="reference"
    ),
}
"""What can be measured. A metric of features is called by its kind and the network, such as ``fd_fashion``."""


def unmet_need(
    kind: str,
    *,
    net: FeatureNet | None,
    real: RealImages | None,
    clip: ClipScore | None,
    lpips: Lpips | None,
    asked: str,
    n: int,
) -> Need | None:
    """The first need of a kind of metric that is not met, None when it can be computed.

    Args:
        kind: a name of `KINDS`.
        net: the feature network.
        real: real images.
        clip: for CLIPScore.
        lpips: for LPIPS.
        asked: what the images were to show, the kind of `Conditions`.
        n: number of images.
    """
    met: dict[Need, bool] = {
        "net": net is not None,
        "real": real is not None,
        "moments": net is not None and n >= 2 * net.dim,
        "samples": real is not None and real.features is not None,
        "classes": hasattr(net, "logits_from_features") and asked == "labels",
        "clip": clip is not None and asked == "prompts",
        "lpips": lpips is not None,
    }
    return next((need for need in KINDS[kind].needs if not met[need]), None)
