"""Precision, recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797) of k-nearest-neighbour balls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..samplers.errors import InputError
from .features import check_features
from .jackknife import BLOCKS, Jackknife, block_slices, mean_jackknife

_CHUNK = 1 << 23
"Distances held at once (64 MiB)."


@dataclass(frozen=True)
class ManifoldScores:
    """The four scores, each in [0, 1] but density, which is about 1 when the distributions are equal.

    Args:
        precision: share of generated images inside the real balls (fidelity).
        recall: share of real images inside the generated balls (variety).
        density: real balls around a generated image, over k.
        coverage: share of real balls that hold a generated image.
    """

    precision: Jackknife
    recall: Jackknife
    density: Jackknife
    coverage: Jackknife


def manifold_scores(real: Tensor, generated: Tensor, *, k: int = 5, blocks: int = BLOCKS) -> ManifoldScores:
    """Scores of ``generated`` against ``real``, real first as in the package ``prdc``.

    All four depend on both sample sizes; compare them only at equal n. The errors are over blocks of generated
    images, with the real ones and the radii of all balls fixed: precision and density are means over generated
    images, recall and coverage are recomputed without each block. None is corrected for bias. In simulations the errors
    of recall and coverage are up to one half too large where the scores are near 1, the others equal the spread.

    Args:
        real: features (n, d).
        generated: features (m, d) in the order of their seeds.
        k: neighbours that set the radius of a ball, itself not counted.
        blocks: blocks of seeds of the jackknife.

    Raises:
        InputError: for NaN, different dimensions, or a set of k images or fewer.
    """
    real, generated = check_features(real, "real features"), check_features(generated, "generated features")
    if real.shape[1] != generated.shape[1]:
        raise InputError(f"features of {real.shape[1]} and {generated.shape[1]} dimensions cannot be compared")
    if min(len(real), len(generated)) <= k:
        raise InputError(
            f"k = {k} neighbours need more than {k} images a side; got {len(real)} real and {len(generated)}"
        )
    centre = real.mean(0)
    real, generated = real - centre, generated.to(real.device) - centre
    real_radii, radii = _squared_radii(real, k), _squared_radii(generated, k)
    cuts = block_slices(len(generated), blocks)
    inside = torch.zeros(len(generated), dtype=torch.float64, device=real.device)
    recalled = torch.zeros(len(real), len(cuts), dtype=torch.bool, device=real.device)
    covered = recalled.clone()
    step = max(1, _CHUNK // len(real))
    for block, cut in enumerate(cuts):
        for start in range(cut.start, cut.stop, step):
            part = slice(start, min(start + step, cut.stop))
            distances = _squared_distances(real, generated[part])
            in_real = distances < real_radii[:, None]
            inside[part] = in_real.sum(0).double()
            covered[:, block] |= in_real.any(1)
            recalled[:, block] |= (distances < radii[None, part]).any(1)
    sizes = [cut.stop - cut.start for cut in cuts]
    return ManifoldScores(
        precision=mean_jackknife((inside > 0).cpu(), blocks),
        recall=_union_jackknife(recalled, sizes),
        density=mean_jackknife(inside.cpu() / k, blocks),
        coverage=_union_jackknife(covered, sizes),
    )


def _union_jackknife(hits: Tensor, sizes: list[int]) -> Jackknife:
    """Share of rows that any block hits, and the same without each block; ``hits`` is bool (n, B)."""
    count = hits.sum(1, keepdim=True)
    replicates = ((count - hits.long()) > 0).double().mean(0)
    plain = (count > 0).double().mean().item()
    return Jackknife.from_replicates(plain, replicates.tolist(), sizes, correct_bias=False)


def _squared_radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row."""
    step = max(1, _CHUNK // len(x))
    radii = []
    for start in range(0, len(x), step):
        distances = _squared_distances(x[start : start + step], x)
        distances.diagonal(start).fill_(torch.inf)
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    squares = x.square().sum(1)[:, None] + y.square().sum(1)[None]
    return squares.addmm_(x, y.T, alpha=-2).clamp_(min=0)
