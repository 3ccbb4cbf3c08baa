"""The scores of one row: its distance to real images, and to the reference row on the same seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..samplers.errors import InputError, unknown_name
from .assets import is_demo
from .clipscore import ClipScore
from .conditions import Conditions
from .feature_files import features_of
from .features import FeatureNet, load_feature_net, metric_name
from .generate import ImageSet
from .jackknife import Estimate, Jackknife, paired_difference
from .metrics import KINDS, WHY_NOT, Need, Sample, unmet_need
from .options import BenchOptions
from .paired import Lpips
from .record import Difference, Floor, Metric, Paired, Worst
from .reference import RealImages, demo_images, folder_images, stored_images

SCORING_VERSION = 1
"Raised with every change that can move a score; records of another version are scored again."

WORST = 8


@dataclass(frozen=True)
class Scores:
    """What one row scores.

    Attributes:
        nfe: counted network evaluations per image.
        metrics: by name.
        differences: to the reference row, by name; empty for the reference itself.
        floor: what real images score.
        worst: the images that are farthest from the reference's.
        warnings: what the reader should know.
        jackknives: what the `differences` of other rows are made from, by name.
        sample: what was judged.
    """

    nfe: float
    metrics: Mapping[str, Metric]
    differences: Mapping[str, Difference]
    floor: Mapping[str, Floor]
    worst: tuple[Worst, ...]
    warnings: tuple[str, ...]
    jackknives: Mapping[str, Jackknife] = field(repr=False)
    sample: Sample = field(repr=False)

    def paired(self, against: str) -> Paired:
        """The differences, for a record."""
        return Paired(against, self.differences)


@dataclass(frozen=True)
class Scorer:
    """Scores the rows of one bench.

    Attributes:
        net: the feature network, None for pixel metrics only.
        real: real images, None for comparisons with the reference row only.
        clip: for CLIPScore, None without its weights.
        lpips: for LPIPS, None without its weights.
        conditions: what the images were to show.
        out: folder of the bench.
        n: images per row.
        wanted: names of metrics; empty for all that can be computed.
    """

    net: FeatureNet | None
    real: RealImages | None
    clip: ClipScore | None
    lpips: Lpips | None
    conditions: Conditions
    out: Path
    n: int
    wanted: tuple[str, ...] = ()

    @classmethod
    def from_options(cls, options: BenchOptions, conditions: Conditions, device: str) -> Scorer:
        """What the options ask for; a demo is scored by its own network and real images unless they say otherwise.

        Raises:
            InputError: for a network or statistics that are missing or do not fit together.
        """
        name = options.net or ("fashion-features" if is_demo(options.pipe) else None)
        if name is None and (options.reference_stats or options.reference_images):
            raise InputError("real images are compared in the features of a network; give it as --net")
        net = load_feature_net(name, options.net_path, device=device, download=options.download) if name else None
        scorer = cls(
            net=net,
            real=_real_images(options, net) if net else None,
            clip=ClipScore.from_folder(options.clip_path, device) if options.clip_path else None,
            lpips=Lpips(options.lpips_path) if options.lpips_path else None,
            conditions=conditions,
            out=options.out,
            n=options.images,
            wanted=options.metrics,
        )
        scorer.kinds()
        return scorer

    @property
    def key(self) -> dict[str, Any]:
        """What the scores of given images depend on."""
        return {
            "version": SCORING_VERSION,
            "net": self.net.fingerprint if self.net else None,
            "real": self.real.key if self.real else None,
            "clip": self.clip.fingerprint if self.clip else None,
            "lpips": self.lpips.fingerprint if self.lpips else None,
            "wanted": sorted(self.wanted),
        }

    def name(self, kind: str) -> str:
        """The name of a metric."""
        if KINDS[kind].suffixed and self.net:
            return metric_name(self.net.name, self.n, self.net.dim, kind)
        return kind

    def unmet(self, kind: str) -> Need | None:
        """The first need of a kind of metric that is not met, None when it can be computed."""
        return unmet_need(
            kind,
            net=self.net,
            real=self.real,
            clip=self.clip,
            lpips=self.lpips,
            asked=self.conditions.kind,
            n=self.n,
        )

    def kinds(self) -> list[str]:
        """The kinds of metrics that will be computed.

        Raises:
            InputError: for a wanted metric that is unknown or cannot be computed.
        """
        unmet = {kind: self.unmet(kind) for kind in KINDS}
        if not self.wanted:
            return [kind for kind, need in unmet.items() if need is None]
        names = {self.name(kind) if need is None else kind: kind for kind, need in unmet.items()}
        for wanted in self.wanted:
            family = wanted if wanted in names else wanted.rsplit("_", 1)[0]
            family = {"fid": "fd", "kid": "kd"}.get(family, family)
            need = unmet.get(names.get(family, family))
            if need is not None:
                raise InputError(f"--metrics {wanted} cannot be computed: {WHY_NOT[need]}")
            if wanted not in names:
                raise unknown_name("metric", wanted, names)
        return [names[wanted] for wanted in self.wanted]

    def score(self, images: ImageSet, reference: Scores | None) -> Scores:
        """Scores a complete set of images.

        Args:
            images: the images.
            reference: scores of the reference row, None for that row itself.
        """
        sample = Sample(
            images=images,
            conditions=self.conditions,
            vectors=features_of(images, self.net, self.out) if self.net else None,
            net=self.net,
            real=self.real,
            clip=self.clip,
            lpips=self.lpips,
            reference=reference.sample if reference else None,
        )
        first = next(images.shards())
        kinds = [
            kind
            for kind in self.kinds()
            if (reference or KINDS[kind].against != "reference")
            and min(first.images.shape[2:]) >= KINDS[kind].least_side
        ]
        estimates = {kind: KINDS[kind].estimate(sample) for kind in kinds}
        jackknives = {self.name(kind): value for kind, value in estimates.items() if isinstance(value, Jackknife)}
        return Scores(
            nfe=first.nfe,
            metrics={self.name(kind): self._metric(kind, value) for kind, value in estimates.items()},
            differences=_differences(jackknives, reference.jackknives) if reference else {},
            floor=self.real.floor if self.real else {},
            worst=_worst(sample) if reference and self.net else (),
            warnings=tuple(dict.fromkeys((*first.warnings, *self._warnings()))),
            jackknives=jackknives,
            sample=sample,
        )

    def _metric(self, kind: str, value: Estimate) -> Metric:
        entry = KINDS[kind]
        against = {"real": self.real.name if self.real else None, "reference": "the reference row"}
        return Metric(
            value=value.value,
            se=value.se,
            n=value.n,
            higher_is_better=entry.higher_is_better,
            net_fingerprint=self.net.fingerprint if self.net and "net" in entry.needs else None,
            reference=against[entry.against] if entry.against else None,
        )

    def _warnings(self) -> tuple[str, ...]:
        notes = list(self.real.warnings) if self.real else []
        if self.net is None:
            notes.append("no feature network was given (--net), so rows are compared with the reference row only")
        elif self.real is None:
            notes.append("no real images were given (--reference_images), so nothing says how good the reference is")
        elif self.n < 2 * self.net.dim:
            notes.append(
                f"n = {self.n} is below {2 * self.net.dim}, twice the {self.net.dim} dimensions of {self.net.name}, "
                "so no Fréchet distance is stated"
            )
        elif self.n < 10 * self.net.dim:
            notes.append(
                f"n = {self.n} is below {10 * self.net.dim}, ten times the {self.net.dim} dimensions of "
                f"{self.net.name}, so the errors of Fréchet distances are somewhat too small"
            )
        return tuple(notes)


def _real_images(options: BenchOptions, net: FeatureNet) -> RealImages | None:
    if options.reference_stats:
        return stored_images(options.reference_stats, net)
    if options.reference_images:
        return folder_images(options.reference_images, net, options.out)
    return demo_images(net) if is_demo(options.pipe) and net.name == "fashion-features" else None


def _differences(ours: Mapping[str, Jackknife], theirs: Mapping[str, Jackknife]) -> dict[str, Difference]:
    pairs = {name: paired_difference(ours[name], theirs[name]) for name in ours if name in theirs}
    return {name: Difference(pair.value, pair.se) for name, pair in pairs.items()}


def _worst(sample: Sample) -> tuple[Worst, ...]:
    distances = sample.feature_distances
    top = distances.topk(min(WORST, len(distances)))
    return tuple(
        Worst(sample.images.seeds[index], value)
        for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    )
