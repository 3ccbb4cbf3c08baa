"""Distances between two batches: one number per sample, at least 0, computed in at least float32."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..samplers.errors import InputError
from ..samplers.registry import Registry


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Distance(ABC):
    """A distance between two batches."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance of each sample, (B,), at least float32.

        Args:
            a: (B, ...), floating point.
            b: shape of ``a``.

        Raises:
            InputError: when shapes disagree; they would be broadcast in silence.
        """
        if a.shape != b.shape:
            raise InputError(f"a distance is between tensors of one shape; got {tuple(a.shape)} and {tuple(b.shape)}")
        return self.of((wide(a) - wide(b)).flatten(1))

    @abstractmethod
    def of(self, difference: Tensor) -> Tensor:
        """The distance (B,) of differences (B, D)."""


DISTANCES: Registry[type[Distance]] = Registry("distance")


@DISTANCES.register("l2")
@dataclass(frozen=True)
class L2(Distance):
    """The mean square."""

    def of(self, difference: Tensor) -> Tensor:
        return difference.square().mean(dim=1)


@DISTANCES.register("l1")
@dataclass(frozen=True)
class L1(Distance):
    """The mean absolute value."""

    def of(self, difference: Tensor) -> Tensor:
        return difference.abs().mean(dim=1)


@DISTANCES.register("huber")
@dataclass(frozen=True)
class Huber(Distance):
    """The mean over elements of sqrt(d^2 + c^2) - c, as the training scripts of LCM, PCM and iCD have it.

    Args:
        c: where the square ends and the absolute value begins, above 0, in units of the data.
    """

    c: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.c < math.inf:
            raise InputError(f"c of the huber distance must be positive and finite; got {self.c}, or use l1")

    def of(self, difference: Tensor) -> Tensor:
        return ((difference.square() + self.c**2).sqrt() - self.c).mean(dim=1)


@DISTANCES.register("pseudo-huber")
@dataclass(frozen=True)
class PseudoHuber(Distance):
    """sqrt(||d||^2 + c^2) - c of the whole sample, arXiv:2310.14189 section 3.3, with c = scale sqrt(D).

    Args:
        scale: c per square root of the number of elements, at least 0. The paper has 0.00054; 0 gives ||d||, the
            default of the released code of consistency tuning (arXiv:2406.14548).
    """

    scale: float = 0.00054

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise InputError(f"scale of the pseudo-huber distance must be 0 or more and finite; got {self.scale}")

    def of(self, difference: Tensor) -> Tensor:
        if self.scale == 0:
            norm: Tensor = torch.linalg.vector_norm(difference, dim=1)  # whose gradient at 0 is 0, not that of sqrt
            return norm
        c = self.scale * math.sqrt(difference.shape[1])
        return (difference.square().sum(dim=1) + c**2).sqrt() - c
