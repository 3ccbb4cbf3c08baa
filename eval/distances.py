"""Fréchet and kernel distance between feature distributions, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from ..samplers.errors import InputError
from .features import FeatureStats, check_features
from .jackknife import Estimate, Jackknife, check_blocks

_CHUNK = 1 << 24
"Elements of a Gram matrix held at once (128 MiB)."


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """Squared Fréchet distance of the Gaussians with the moments of ``a`` and ``b`` (arXiv:1706.08500, Eq. 6).

    tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of S2^(1/2) S1 S2^(1/2), which is symmetric: no
    matrix square root of a product, no imaginary part, no added diagonal. The root of ``b`` is kept, so give the
    reference second. With fewer images than dimensions `frechet_distance_features` is faster and more exact.

    Returns:
        The distance in squared feature units; rounding can make that of equal statistics slightly negative.

    Raises:
        InputError: when the statistics are of different nets, or of fewer than two images.
    """
    a.check_same_net(b)
    eigenvalues: Tensor = torch.linalg.eigvalsh(b.root @ a.cov @ b.root)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return distance.item()


def frechet_distance_features(x: Tensor, y: Tensor) -> float:
    """The same distance between feature matrices ``x`` (n, d) and ``y`` (m, d).

    The cross term is the nuclear norm of X Y^T, whose rows are contrasts of the images (`_contrasts`): no d x d
    matrix is rooted, the way to go when n < d. A set of more than d rows is first reduced to the R of its QR.
    """
    x, y = _pair(x, y)
    if min(len(x), len(y)) < 2:
        raise InputError(f"a Fréchet distance needs at least 2 images a side; got {len(x)} and {len(y)}")
    factors = [_contrasts(z) for z in (x, y)]
    traces = sum(f.square().sum() for f in factors)
    small = [torch.linalg.qr(f, mode="r").R if len(f) > f.shape[1] else f for f in factors]
    cross = _nuclear_norm(small[0] @ small[1].T)
    return ((x.mean(0) - y.mean(0)).square().sum() + traces - 2 * cross).item()


def _contrasts(x: Tensor) -> Tensor:
    """The n - 1 Helmert contrasts C of ``x``, with C^T C its covariance.

    Unlike the n centred rows they are linearly independent, so that no singular value is zero by construction.
    """
    x = x - x.mean(0)
    k = torch.arange(1, len(x), dtype=x.dtype, device=x.device)[:, None]
    return (x.cumsum(0)[:-1] - k * x[1:]) / (k * (k + 1)).sqrt() / math.sqrt(len(x) - 1)


def _nuclear_norm(matrix: Tensor) -> Tensor:
    """Sum of the singular values.

    By the eigenvalues of the smaller Gram matrix, at half the time of an SVD, where a bound on their rounding
    (about 1,000 times the actual one) stays below 1e-7 of the sum; else by the SVD.
    """
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    squares: Tensor = torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0)
    noise = 16 * torch.finfo(squares.dtype).eps * squares[-1]
    values = squares.sqrt()
    bound = (noise / (2 * values.clamp(min=noise.sqrt()))).sum()
    if not bound <= 1e-7 * values.sum():
        values = torch.linalg.svdvals(matrix)
    return values.sum()


def frechet_jackknife(blocks: Sequence[FeatureStats], reference: FeatureStats) -> Jackknife:
    """Bias-corrected Fréchet distance of generated ``blocks`` to a fixed ``reference``, with its error.

    Leaving out a block is a subtraction of its sums, so B blocks cost B + 1 eigenvalue problems and no image is
    read again. The correction removes the bias of order 1/n of the generated side; the error is that of the
    generated side too, as the reference is the same for every method. Cover is nominal from about n = 10 d.
    """
    check_blocks(blocks)
    total = reduce(add, blocks)
    replicates = [frechet_distance(total - block, reference) for block in blocks]
    sizes = [block.n for block in blocks]
    return Jackknife.from_replicates(frechet_distance(total, reference), replicates, sizes, correct_bias=True)


def kernel_distance(x: Tensor, y: Tensor) -> Estimate:
    """Unbiased squared MMD with the kernel (x.y/d + 1)^3 (arXiv:1801.01401, Eq. 4) over all pairs.

    The error is that of the U-statistic over both samples: the delete-one jackknife, less what it counts twice.
    In Hoeffding's decomposition the jackknife counts the part of order k in the images k times; the part of
    order two, which is all there is when both distributions are equal, is estimated from the doubly centred Gram
    matrices and taken out once. In simulations the error equals the spread, but for equal distributions, where
    it is a fifth too large.

    Args:
        x: features (n, d), n >= 3.
        y: features (m, d), m >= 3.

    Returns:
        Estimate in units of the kernel, with ``n`` that of ``x``; it can be negative, as it is unbiased.
    """
    x, y = _pair(x, y)
    n, m = len(x), len(y)
    if min(n, m) < 3:
        raise InputError(f"a kernel distance with an error needs 3 images a side; got {n} and {m}")
    xx, yy, xy = _gram_sums(x, x, within=True), _gram_sums(y, y, within=True), _gram_sums(x, y, within=False)
    a, b, c = xx.rows.sum(), yy.rows.sum(), xy.rows.sum()
    value = a / (n * (n - 1)) + b / (m * (m - 1)) - 2 * c / (n * m)
    without_x = (a - 2 * xx.rows) / ((n - 1) * (n - 2)) - 2 * (c - xy.rows) / ((n - 1) * m)
    without_y = (b - 2 * yy.rows) / ((m - 1) * (m - 2)) - 2 * (c - xy.columns) / ((m - 1) * n)
    jackknife = (n - 1) * without_x.var(correction=0) + (m - 1) * without_y.var(correction=0)
    second = (
        2 * xx.degenerate(within=True) / (n * (n - 1))
        + 2 * yy.degenerate(within=True) / (m * (m - 1))
        + 4 * xy.degenerate(within=False) / (n * m)
    )
    return Estimate(value.item(), torch.maximum(jackknife - second, second).sqrt().item(), n)


def kernel_jackknife(blocks: Sequence[Tensor], reference: Tensor) -> Jackknife:
    """The same distance of generated ``blocks`` to a fixed ``reference``, with replicates over the blocks.

    The value is that of `kernel_distance`, unbiased and left alone; the error is of the generated side only.
    """
    check_blocks(blocks)
    x, y = _pair(torch.cat(list(blocks)), reference)
    sizes = torch.tensor([len(block) for block in blocks])
    n, m = len(x), len(y)
    if n - int(sizes.max()) < 2 or m < 2:
        raise InputError(f"a kernel distance needs 2 images a side without any block; got {n} and {m}")
    cuts = [slice(end - size, end) for size, end in zip(sizes.tolist(), sizes.cumsum(0).tolist(), strict=True)]
    within = torch.stack([_gram_sums(x, x[cut], within=False).rows for cut in cuts], 1)  # (n, B)
    between = torch.stack([within[cut].sum(0) for cut in cuts]).cpu()  # (B, B)
    diagonal = (x.square().sum(1) / x.shape[1] + 1) ** 3
    between -= torch.diag(torch.stack([diagonal[cut].sum() for cut in cuts]).cpu())
    rows = _gram_sums(x, y, within=False).rows
    cross = torch.stack([rows[cut].sum() for cut in cuts]).cpu()
    constant = _gram_sums(y, y, within=True).rows.sum().item() / (m * (m - 1))

    def value(a: Tensor, c: Tensor, k: Tensor) -> Tensor:
        return a / (k * (k - 1)) + constant - 2 * c / (k * m)

    plain = value(between.sum(), cross.sum(), sizes.sum())
    rest = between.sum() - 2 * between.sum(1) + between.diagonal()
    replicates = value(rest, cross.sum() - cross, n - sizes)
    return Jackknife.from_replicates(plain.item(), replicates.tolist(), sizes.tolist(), correct_bias=False)


@dataclass(frozen=True)
class _GramSums:
    """Row sums (n,), column sums (m,) and the sum of squares of a Gram matrix, without its diagonal if within."""

    rows: Tensor
    columns: Tensor
    squares: Tensor

    def degenerate(self, *, within: bool) -> Tensor:
        """Mean square of the doubly centred entries k_ij - r_i - c_j + t, from the sums alone."""
        n, m = len(self.rows), len(self.columns)
        counts = (n - 1, n - 1) if within else (m, n)
        pairs = n * counts[0]
        r, c = self.rows / counts[0], self.columns / counts[1]
        t = self.rows.sum() / pairs
        if within:  # (r_i - t) + (r_j - t), summed over i != j
            means = 2 * (n - 2) * (r - t).square().sum()
            products = 4 * ((r - t) * self.rows).sum()
        else:
            means = m * (r - t).square().sum() + n * (c - t).square().sum()
            products = 2 * ((r - t) * self.rows).sum() + 2 * ((c - t) * self.columns).sum()
        centred = self.squares - pairs * t.square() - products + means
        return (centred / pairs).clamp(min=0)


def _gram_sums(x: Tensor, y: Tensor, *, within: bool) -> _GramSums:
    rows, squares = [], x.new_zeros(())
    columns = x.new_zeros(len(y))
    step = max(1, _CHUNK // len(y))
    for start in range(0, len(x), step):
        gram = (x[start : start + step] @ y.T / x.shape[1] + 1) ** 3
        if within:
            gram.diagonal(start).zero_()
        rows.append(gram.sum(1))
        columns += gram.sum(0)
        squares += gram.square().sum()
    return _GramSums(torch.cat(rows), columns, squares)


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = check_features(x), check_features(y)
    if x.shape[1] != y.shape[1]:
        raise InputError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared")
    return x, y.to(x.device)
