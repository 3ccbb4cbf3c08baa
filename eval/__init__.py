"""Scoring of generated images: quality with errors, speed, one report."""

from ..samplers.errors import InputError
from .distances import (
    frechet_distance,
    frechet_distance_features,
    frechet_jackknife,
    kernel_distance,
    kernel_jackknife,
)
from .features import FEATURE_NETS, Classifier, FeatureNet, FeatureStats, load_feature_net, metric_name
from .jackknife import (
    Estimate,
    Jackknife,
    block_jackknife,
    block_slices,
    mean_estimate,
    mean_jackknife,
    paired_difference,
)
from .manifold import ManifoldScores, manifold_scores
from .paired import Lpips, feature_distance, psnr, ssim
from .quantise import as_rgb, check_uint8, to_uint8
from .vendi import vendi_jackknife, vendi_score

__all__ = [
    "FEATURE_NETS",
    "Classifier",
    "Estimate",
    "FeatureNet",
    "FeatureStats",
    "InputError",
    "Jackknife",
    "Lpips",
    "ManifoldScores",
    "as_rgb",
    "block_jackknife",
    "block_slices",
    "check_uint8",
    "feature_distance",
    "frechet_distance",
    "frechet_distance_features",
    "frechet_jackknife",
    "kernel_distance",
    "kernel_jackknife",
    "load_feature_net",
    "manifold_scores",
    "mean_estimate",
    "mean_jackknife",
    "metric_name",
    "paired_difference",
    "psnr",
    "ssim",
    "to_uint8",
    "vendi_jackknife",
    "vendi_score",
]
