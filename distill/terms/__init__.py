"""What a student is trained on: losses per sample of networks that are called as ``(x, t) -> Prediction``."""

from .adversarial import GAN_LOSSES, FeatureHeads, GANLoss, Hinge, LeastSquares, SaturatingHinge, Softplus
from .dsm import DSM
from .match import Match, inverse_gap
from .mmd import MMD, Polynomial
from .regression import Regression, progressive_goal, truncated_snr
from .scoregap import DMD, SIM, VSD, SiD
from .tangent import Tangent, circle_velocity

__all__ = [
    "DMD",
    "DSM",
    "GAN_LOSSES",
    "MMD",
    "SIM",
    "VSD",
    "FeatureHeads",
    "GANLoss",
    "Hinge",
    "LeastSquares",
    "Match",
    "Polynomial",
    "Regression",
    "SaturatingHinge",
    "SiD",
    "Softplus",
    "Tangent",
    "circle_velocity",
    "inverse_gap",
    "progressive_goal",
    "truncated_snr",
]
