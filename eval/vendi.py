"""The Vendi score (arXiv:2210.02410): the effective number of different images in a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..samplers.errors import InputError
from .features import check_features
from .jackknife import BLOCKS, Jackknife, block_jackknife, block_slices


def vendi_score(features: Tensor) -> float:
    """exp of the entropy of the eigenvalues of K / n, with K the cosine similarities of ``features`` (n, d).

    Eq. 2 of the paper; K / n and the d x d matrix of the normalised features share their non-zero eigenvalues,
    so the smaller of the two is solved.

    Returns:
        A number from 1 (all alike) to min(n, d) (all orthogonal).

    Raises:
        InputError: for NaN, or a feature vector of length zero, which has no direction.
    """
    x = _normalised(features)
    return _effective_number(x.T @ x if len(x) > x.shape[1] else x @ x.T, len(x))


def vendi_jackknife(features: Tensor, blocks: int = BLOCKS) -> Jackknife:
    """The score of ``features`` (n, d) in the order of their seeds, with its error over blocks of seeds.

    The score grows with n, so it is not corrected; compare it only at equal n.
    """
    x = _normalised(features)
    cuts = block_slices(len(x), blocks)

    def score(chosen: Sequence[range]) -> float:
        n = sum(map(len, chosen))
        if n > x.shape[1]:
            return _effective_number(torch.stack([outer[part.start] for part in chosen]).sum(0), n)
        rows = torch.cat([x[part.start : part.stop] for part in chosen])
        return _effective_number(rows @ rows.T, n)

    outer = {cut.start: x[cut].T @ x[cut] for cut in cuts}
    return block_jackknife(score, [range(cut.start, cut.stop) for cut in cuts], correct_bias=False)


def _normalised(features: Tensor) -> Tensor:
    x = check_features(features)
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if (lengths == 0).any():
        first = int((lengths[:, 0] == 0).nonzero()[0])
        raise InputError(f"the features of image {first} are all zero and have no direction; check the feature net")
    return x.div(lengths)


def _effective_number(gram: Tensor, n: int) -> float:
    p: Tensor = torch.linalg.eigvalsh(gram / n)
    entropy: Tensor = torch.special.entr(p.clamp(min=0)).sum()
    return math.exp(entropy.item())
