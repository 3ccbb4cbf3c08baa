"""Estimates with errors: means, the delete-a-block jackknife over seeds, and paired differences.

Blocks are blocks of seeds. Two methods run on the same seeds share their noise, so the difference of their
replicates has a far smaller error than the two values have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import TypeVar

import torch
from scipy.special import stdtrit
from torch import Tensor

from ..samplers.errors import InputError

Block = TypeVar("Block", bound=Sized)

BLOCKS = 20
"Blocks of seeds when none are asked for."


@dataclass(frozen=True)
class Estimate:
    """A number with its error.

    Args:
        value: the estimate.
        se: its standard error, in the same unit.
        n: number of images (or pairs) behind it.
    """

    value: float
    se: float
    n: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval ``value -+ q se``, with q the normal quantile (1.96 at 95 %)."""
        reach = self._quantile(0.5 + level / 2) * self.se
        return self.value - reach, self.value + reach

    def _quantile(self, p: float) -> float:
        return NormalDist().inv_cdf(p)


@dataclass(frozen=True)
class Jackknife(Estimate):
    """An estimate whose error comes from leaving out one block at a time.

    ``interval`` uses Student's t with one degree of freedom less than there are blocks (2.09 for 20 at 95 %).

    Args:
        plain: the statistic of all images; ``value`` is either this or its bias-corrected form.
        replicates: the statistic without block j, in the order of the blocks.
        sizes: images in each block.
    """

    plain: float
    replicates: tuple[float, ...]
    sizes: tuple[int, ...]

    @classmethod
    def from_replicates(
        cls, plain: float, replicates: Sequence[float], sizes: Sequence[int], *, correct_bias: bool
    ) -> Jackknife:
        """Value and error of leave-one-out ``replicates`` (Busing, Meijer and van der Leeden 1999, delete-m_j).

        With equal blocks this is the usual jackknife: value ``B plain - (B - 1) mean``, variance
        ``(B - 1) / B`` times the sum of squares about the mean.

        Args:
            plain: the statistic of all images.
            replicates: the statistic without block j.
            sizes: images in each block.
            correct_bias: whether ``value`` is corrected for a bias of order 1/n. An unbiased statistic, or one
                that is defined at its n (coverage, Vendi), keeps its plain value.
        """
        n, blocks = sum(sizes), len(sizes)
        jackknifed = blocks * plain - sum((1 - m / n) * r for m, r in zip(sizes, replicates, strict=True))
        variance = 0.0
        for m, replicate in zip(sizes, replicates, strict=True):
            h = n / m
            variance += (h * plain - (h - 1) * replicate - jackknifed) ** 2 / (h - 1) / blocks
        value = jackknifed if correct_bias else plain
        return cls(value, math.sqrt(variance), n, plain, tuple(replicates), tuple(sizes))

    def _quantile(self, p: float) -> float:
        return float(stdtrit(len(self.sizes) - 1, p))


def block_slices(n: int, blocks: int = BLOCKS) -> tuple[slice, ...]:
    """Cuts ``range(n)`` into contiguous blocks whose sizes differ by at most one.

    Raises:
        InputError: when there are fewer images than blocks, or fewer than two blocks.
    """
    if blocks < 2 or n < blocks:
        raise InputError(f"{blocks} blocks need at least 2 blocks and an image in each; got {n} images")
    edges = [n * i // blocks for i in range(blocks + 1)]
    return tuple(slice(first, end) for first, end in pairwise(edges))


def block_jackknife(
    statistic: Callable[[Sequence[Block]], float], blocks: Sequence[Block], *, correct_bias: bool = True
) -> Jackknife:
    """Delete-a-block jackknife of any statistic.

    Args:
        statistic: a number from a sequence of blocks; called once with all and once without each.
        blocks: at least two; ``len(block)`` is its number of images.
        correct_bias: see `Jackknife.from_replicates`.
    """
    check_blocks(blocks)
    replicates = [statistic([*blocks[:j], *blocks[j + 1 :]]) for j in range(len(blocks))]
    sizes = [len(block) for block in blocks]
    return Jackknife.from_replicates(statistic(blocks), replicates, sizes, correct_bias=correct_bias)


def check_blocks(blocks: Sequence[Sized]) -> None:
    """Raises ``InputError`` unless there are two blocks with an image in each."""
    if len(blocks) < 2 or any(len(block) == 0 for block in blocks):
        raise InputError(f"a jackknife needs at least two blocks, none empty; got sizes {[len(b) for b in blocks]}")


def mean_estimate(values: Tensor) -> Estimate:
    """Mean of independent ``values`` (n,), with standard error sd / sqrt(n)."""
    values = _check_values(values)
    if len(values) < 2:
        raise InputError(f"a standard error needs at least 2 values; got {len(values)}")
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(len(values)), len(values))


def mean_jackknife(values: Tensor, blocks: int = BLOCKS) -> Jackknife:
    """Mean of ``values`` (n,) in the order of their seeds, with replicates for paired differences."""
    values = _check_values(values)
    cuts = block_slices(len(values), blocks)
    sums = torch.stack([values[cut].sum() for cut in cuts])
    sizes = [cut.stop - cut.start for cut in cuts]
    rest = torch.tensor([len(values) - size for size in sizes])
    replicates = (sums.sum() - sums) / rest
    return Jackknife.from_replicates(values.mean().item(), replicates.tolist(), sizes, correct_bias=False)


def paired_difference(a: Jackknife, b: Jackknife) -> Estimate:
    """``a - b`` of two methods on the same blocks of seeds, with the error of the difference.

    Raises:
        InputError: when the blocks differ.
    """
    if a.sizes != b.sizes:
        raise InputError(
            f"a paired difference needs the same seeds in the same blocks; got blocks of {a.sizes} and {b.sizes}"
        )
    plain = a.plain - b.plain
    replicates = [r - s for r, s in zip(a.replicates, b.replicates, strict=True)]
    error = Jackknife.from_replicates(plain, replicates, a.sizes, correct_bias=False).se
    return Jackknife(a.value - b.value, error, a.n, plain, tuple(replicates), a.sizes)


def _check_values(values: Tensor) -> Tensor:
    if values.dim() != 1 or not torch.isfinite(values.double()).all():
        raise InputError(f"values must be finite and of shape (n,); got {tuple(values.shape)}")
    return values.double()
