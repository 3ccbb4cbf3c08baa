"""A limit to what a change of the plan may cost in quality, measured in pairs against the plan without it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..eval.clipscore import ClipScore
from ..eval.distances import frechet_jackknife
from ..eval.features import FeatureNet, FeatureStats
from ..eval.jackknife import BLOCKS, Estimate, block_slices, mean_estimate, paired_difference
from ..eval.paired import Lpips, feature_distance, psnr
from ..eval.quantise import to_uint8
from ..eval.reference import RealImages
from ..samplers.errors import InputError, unknown_name

Relation = Literal["<=", ">="]


@dataclass(frozen=True)
class Judges:
    """What metrics judge with, as far as it is there.

    Attributes:
        net: a feature network.
        real: real images as that network sees them.
        lpips: LPIPS with its backbone.
        clip: a CLIP for CLIPScore.
    """

    net: FeatureNet | None = None
    real: RealImages | None = None
    lpips: Lpips | None = None
    clip: ClipScore | None = None


@dataclass(frozen=True)
class BudgetMetric:
    """One way to compare samples with those of the plan without the change.

    Attributes:
        relation: on which side of the limit good values are.
        measure: the number and its error from samples (n, ...) float, images (n, C, H, W) in 0 to 1 but for
            ``relative_error``, the same number of others, and judges.
        needs: names of the judges that it needs.
    """

    relation: Relation
    measure: Callable[[Tensor, Tensor, Judges], Estimate]
    needs: tuple[str, ...] = ()


def relative_errors(samples: Tensor, others: Tensor) -> Tensor:
    """L2 distance of samples (n, ...) to others over the norm of the others, float64 (n,)."""
    norms = [
        (pair - other).double().norm() / other.double().norm() for pair, other in zip(samples, others, strict=True)
    ]
    return torch.stack(norms)


def _relative_error(samples: Tensor, others: Tensor, judges: Judges) -> Estimate:
    return mean_estimate(relative_errors(samples, others))


def _psnr(samples: Tensor, others: Tensor, judges: Judges) -> Estimate:
    return mean_estimate(psnr(to_uint8(samples), to_uint8(others)))


def _features(net: Any, samples: Tensor) -> Tensor:
    return torch.cat([net(to_uint8(batch)) for batch in torch.split(samples, 64)])


def _feature_distance(samples: Tensor, others: Tensor, judges: Judges) -> Estimate:
    return mean_estimate(feature_distance(_features(judges.net, samples), _features(judges.net, others)))


def _lpips(samples: Tensor, others: Tensor, judges: Judges) -> Estimate:
    assert judges.lpips is not None
    pairs = zip(*(torch.split(to_uint8(images), 64) for images in (samples, others)), strict=True)
    return mean_estimate(torch.cat([judges.lpips(*pair) for pair in pairs]))


def _frechet(samples: Tensor, others: Tensor, judges: Judges) -> Estimate:
    """How much farther from the real images the samples are than the others."""
    net = judges.net
    assert net is not None
    assert judges.real is not None
    real = judges.real.stats
    if len(samples) < 2 * net.dim:
        raise InputError(f"a Fréchet distance needs n of at least {2 * net.dim}; got {len(samples)}; raise --n")
    cuts = block_slices(len(samples), BLOCKS)
    found = []
    for images in (samples, others):
        features = _features(net, images)
        parts = [FeatureStats.from_features(features[cut], fingerprint=real.fingerprint) for cut in cuts]
        found.append(frechet_jackknife(parts, real))
    return paired_difference(*found)


METRICS: dict[str, BudgetMetric] = {
    "relative_error": BudgetMetric("<=", _relative_error),
    "psnr": BudgetMetric(">=", _psnr),
    "feature_distance": BudgetMetric("<=", _feature_distance, ("net",)),
    "lpips": BudgetMetric("<=", _lpips, ("lpips",)),
    "fd": BudgetMetric("<=", _frechet, ("net", "real")),
}
"""Metrics of a budget: PSNR in dB, LPIPS, distance of features, relative L2 error of what the pipeline returns, and the
increase of the Fréchet distance to real images."""

_WANTED: Mapping[str, str] = {
    "net": "a feature network, see --net",
    "real": "statistics of real images of that network, which ship for the demos",
    "lpips": "the weights of its backbone, see --lpips_path",
}


@dataclass(frozen=True)
class Budget:
    """A limit such as ``psnr>=30``.

    Attributes:
        metric: a name of `METRICS`.
        limit: the worst value that is accepted.
    """

    metric: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """The budget that ``lpips<=0.05`` says.

        Raises:
            InputError: when it is not of that form, or the relation is not the metric's.
        """
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*(\S+)\s*", text)
        if match is None:
            raise InputError(f"a budget is a metric, <= or >=, and a number, such as psnr>=30; got {text!r}")
        metric, relation, limit = match.groups()
        if metric not in METRICS:
            raise unknown_name("metric of a budget", metric, METRICS)
        if relation != METRICS[metric].relation:
            raise InputError(f"good values of {metric} are {METRICS[metric].relation} the limit; got {text!r}")
        try:
            value = float(limit)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"the limit of a budget is a finite number; got {limit!r}")
        return cls(metric, value)

    def __str__(self) -> str:
        return f"{self.metric}{METRICS[self.metric].relation}{self.limit:g}"

    def check(self, judges: Judges) -> None:
        """Raises ``InputError`` when the metric needs a judge that is not there."""
        for need in METRICS[self.metric].needs:
            if getattr(judges, need) is None:
                raise InputError(f"a budget of {self.metric} needs {_WANTED[need]}")

    def measure(self, samples: Tensor, others: Tensor, judges: Judges) -> Estimate:
        """The metric of samples (n, ...) beside those of the plan without the change."""
        return METRICS[self.metric].measure(samples, others, judges)

    def allows(self, value: float) -> bool:
        """Whether a value is within the limit."""
        return value <= self.limit if METRICS[self.metric].relation == "<=" else value >= self.limit
