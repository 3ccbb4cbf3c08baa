"""What a module will give, from what it gave: the polynomial through its last values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def forecast(values: Sequence[tuple[int, Any]], position: int) -> Any:
    """The value at ``position`` of the polynomial through ``values``; of a single one, that value itself.

    TaylorSeer (arXiv:2503.06923) forecasts with a Taylor polynomial whose derivatives are finite differences of the
    last m + 1 values. Here the same differences stand in Newton's form, F[n] + (k - n) F[n, n'] + (k - n)(k - n')
    F[n, n', n''] + ..., which is exact where the values are a polynomial of degree m, also between uneven steps; both
    agree up to order 1. It is summed in Lagrange's form, in float32 at the least.

    Args:
        values: when each was computed, in steps of the scheduler, all different; and tensors in tuples, lists and
            dictionaries, alike in structure and shapes. Newest first.
        position: in steps of the scheduler.
    """
    if len(values) == 1:
        return values[0][1]
    weights = weights_at([step for step, _ in values], position)

    def blend(*leaves: Any) -> Any:
        newest = leaves[0]
        if not isinstance(newest, Tensor) or not newest.is_floating_point():
            return newest
        total = newest.to(torch.promote_types(newest.dtype, torch.float32)) * weights[0]
        for weight, leaf in zip(weights[1:], leaves[1:], strict=True):
            total.add_(leaf, alpha=weight)
        return total.to(newest.dtype)

    trees = [tree for _, tree in values]
    return blend(*trees) if isinstance(trees[0], Tensor) else tree_map(blend, *trees)


def weights_at(steps: Sequence[int], position: int) -> list[float]:
    """The weights of values at ``steps``, all different, in what the polynomial through them is at ``position``."""
    return [math.prod((position - other) / (step - other) for other in steps if other != step) for step in steps]
