"""What a network predicts, as linear maps between (x0, eps) and (x, output).

With x = alpha x0 + sigma eps, every prediction type is one line ``output = m x0 + n eps``. x0 and eps follow
from x and the output by solving the two equations; determinant alpha n - sigma m.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .registry import Registry


class OfState(NamedTuple):
    """A linear combination of the state x and the network output: its two coefficients, float64."""

    x: Tensor
    out: Tensor


class OfPair(NamedTuple):
    """A linear combination of x0 and eps: its two coefficients, float64."""

    x0: Tensor
    eps: Tensor

    def through(self, prediction: Prediction, alpha: Tensor, sigma: Tensor) -> OfState:
        """The same quantity in terms of state and network output; none (0) of infinity is none."""
        x0, eps = prediction.x0(alpha, sigma), prediction.eps(alpha, sigma)
        return OfState(
            x=_part(self.x0, x0.x) + _part(self.eps, eps.x),
            out=_part(self.x0, x0.out) + _part(self.eps, eps.out),
        )


def _part(factor: Tensor, value: Tensor) -> Tensor:
    return torch.where((factor == 0) & ~value.isfinite(), 0.0, factor * value)


class Prediction(ABC):
    """One prediction type. Coefficients are not finite where the output does not determine x0 or eps."""

    #: The prediction type, in diffusers' words where it has one.
    name: ClassVar[str]

    @abstractmethod
    def target(self, alpha: Tensor, sigma: Tensor) -> OfPair:
        """The network output as a combination of x0 and eps."""

    def x0(self, alpha: Tensor, sigma: Tensor) -> OfState:
        """x0 as a combination of state and output."""
        m, n = self.target(alpha, sigma)
        determinant = alpha * n - sigma * m
        return OfState(n / determinant, -sigma / determinant)

    def eps(self, alpha: Tensor, sigma: Tensor) -> OfState:
        """Eps as a combination of state and output."""
        m, n = self.target(alpha, sigma)
        determinant = alpha * n - sigma * m
        return OfState(-m / determinant, alpha / determinant)


@dataclass(frozen=True)
class Epsilon(Prediction):
    """The noise, arXiv:2006.11239. Says nothing about x0 where alpha = 0."""

    name: ClassVar[str] = "epsilon"

    def target(self, alpha: Tensor, sigma: Tensor) -> OfPair:
        return OfPair(torch.zeros_like(alpha), torch.ones_like(alpha))

    def eps(self, alpha: Tensor, sigma: Tensor) -> OfState:
        return OfState(torch.zeros_like(alpha), torch.ones_like(alpha))


@dataclass(frozen=True)
class Sample(Prediction):
    """The clean sample. Says nothing about eps where sigma = 0."""

    name: ClassVar[str] = "sample"

    def target(self, alpha: Tensor, sigma: Tensor) -> OfPair:
        return OfPair(torch.ones_like(alpha), torch.zeros_like(alpha))

    def x0(self, alpha: Tensor, sigma: Tensor) -> OfState:
        return OfState(torch.zeros_like(alpha), torch.ones_like(alpha))


@dataclass(frozen=True)
class Velocity(Prediction):
    """v = alpha eps - sigma x0, arXiv:2202.00512 appendix D."""

    name: ClassVar[str] = "v_prediction"

    def target(self, alpha: Tensor, sigma: Tensor) -> OfPair:
        return OfPair(-sigma, alpha)


@dataclass(frozen=True)
class Flow(Prediction):
    """The direction from data to noise, eps - x0, arXiv:2209.03003."""

    name: ClassVar[str] = "flow_prediction"

    def target(self, alpha: Tensor, sigma: Tensor) -> OfPair:
        return OfPair(-torch.ones_like(alpha), torch.ones_like(alpha))


@dataclass(frozen=True)
class InvertedFlow(Prediction):
    """The direction from noise to data, x0 - eps."""

    name: ClassVar[str] = "inverted_flow"

    def target(self, alpha: Tensor, sigma: Tensor) -> OfPair:
        return OfPair(torch.ones_like(alpha), -torch.ones_like(alpha))


@dataclass(frozen=True)
class EDM(Prediction):
    """F of x0 = c_skip x + c_out F, arXiv:2206.00364 equation 7 and table 1, for alpha = 1.

    c_skip = d^2 / (sigma^2 + d^2) and c_out = sigma d / sqrt(sigma^2 + d^2) with d = ``sigma_data``.
    """

    sigma_data: float
    name: ClassVar[str] = "edm"

    def target(self, alpha: Tensor, sigma: Tensor) -> OfPair:
        scale = (sigma**2 + self.sigma_data**2).rsqrt()
        return OfPair(sigma / self.sigma_data * scale, -self.sigma_data * scale)


@dataclass(frozen=True)
class EDMVelocity(EDM):
    """The same with c_out negated, which is v-prediction for data of standard deviation ``sigma_data``."""

    name: ClassVar[str] = "edm_v"

    def target(self, alpha: Tensor, sigma: Tensor) -> OfPair:
        x0, eps = super().target(alpha, sigma)
        return OfPair(-x0, -eps)


PREDICTIONS: Registry[Prediction] = Registry("prediction type")
PREDICTIONS.register("epsilon")(Epsilon())
PREDICTIONS.register("sample")(Sample())
PREDICTIONS.register("original_sample")(Sample())  # the alias that EulerDiscreteScheduler accepts
PREDICTIONS.register("v_prediction")(Velocity())
PREDICTIONS.register("flow_prediction")(Flow())
