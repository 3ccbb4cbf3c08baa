"""Maximum mean discrepancy between features of the student's samples and of real ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from ...samplers.errors import InputError


@dataclass(frozen=True)
class Polynomial:
    """(<a, b> / D + 1)^degree, the kernel of the kernel inception distance (arXiv:1801.01401)."""

    degree: int = 3

    def __post_init__(self) -> None:
        if self.degree < 1:
            raise InputError(f"degree of the polynomial kernel must be at least 1; got {self.degree}")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Kernel of each pair, (N, M), of features (N, D) and (M, D)."""
        return (a @ b.T / a.shape[1] + 1) ** self.degree


@dataclass(frozen=True)
class MMD:
    """The unbiased squared discrepancy, as MMD-DDM finetunes with it (arXiv:2301.07969).

    Its mean over samples is the U-statistic: in expectation the squared discrepancy of the two laws, and 0 for equal
    ones; one batch's may be negative. In float64, as the sums cancel.

    Args:
        kernel: of two batches of features.
    """

    kernel: Polynomial = field(default_factory=Polynomial)

    def __call__(self, made: Tensor, real: Tensor) -> Tensor:
        """Each made sample's share, (N,) float32, whose mean is the squared discrepancy.

        Args:
            made: features (N, D) of the student's samples, with gradient; N at least 2.
            real: features (M, D) of real samples; M at least 2. No gradient goes there.

        Raises:
            InputError: when a batch is too small for the unbiased form, or dimensions disagree.
        """
        count, others = len(made), len(real)
        if min(count, others) < 2:
            raise InputError(f"the unbiased discrepancy needs 2 samples on either side; got {count} and {others}")
        if made.ndim != 2 or made.shape[1:] != real.shape[1:]:
            raise InputError(f"features must be (N, D) of one D; got {tuple(made.shape)} and {tuple(real.shape)}")
        x, y = made.double(), real.detach().double()
        within_x, within_y, across = self.kernel(x, x), self.kernel(y, y), self.kernel(x, y)
        own = (within_x.sum(dim=1) - within_x.diagonal()) / (count - 1)
        others_own = (within_y.sum() - within_y.trace()) / math.perm(others, 2)
        return (own - 2 * across.mean(dim=1) + others_own).float()
