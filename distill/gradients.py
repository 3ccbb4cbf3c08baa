"""Gradients averaged over processes, once per update, and clipped.

The networks are not wrapped in ``DistributedDataParallel``: with adapters that are switched, several forward passes
per backward pass and roles that take turns, its reducer waits for gradients that do not come.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .shards import Share

BUCKET = 2**25
"Elements that are exchanged at a time, unless one parameter has more."


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Replaces each gradient by its mean over the processes.

    A parameter that has a gradient in some processes only counts as zero in the others; one that has none anywhere
    keeps none.

    Args:
        parameters: in the same order in all processes.
        accelerator: knows the processes.
    """
    if accelerator.num_processes == 1 or not parameters:
        return
    has = torch.tensor([float(p.grad is not None) for p in parameters], device=accelerator.device)
    anywhere = accelerator.reduce(has, "sum").tolist()
    shared = [p for p, count in zip(parameters, anywhere, strict=True) if count]
    for bucket in _buckets(shared):
        flat = torch.cat([_gradient(p).flatten() for p in bucket])
        means = accelerator.reduce(flat, "mean").split([p.numel() for p in bucket])
        for parameter, mean in zip(bucket, means, strict=True):
            parameter.grad = mean.view_as(parameter)


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """As ``torch.nn.utils.clip_grad_norm_`` for parameters some of which are cut over the processes.

    Args:
        parameters: with a `Share` among them; the gradients of those that are not cut are the same in all processes.
        limit: on the norm.

    Returns:
        The norm over all parameters and processes before clipping, a scalar.
    """
    sharing = next(parameter.sharing for parameter in parameters if isinstance(parameter, Share))
    squares = torch.zeros(2, device=sharing.device)
    for parameter in parameters:
        if parameter.grad is not None:
            squares[int(isinstance(parameter, Share))] += parameter.grad.float().square().sum()
    kept, cut = squares
    norm: Tensor = (kept + sharing.sum(cut)).sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
    return norm


@torch.no_grad()
def spread_overflow(parameters: Sequence[Share]) -> None:
    """Makes gradients that are not finite in one process not finite in all, so that all scalers skip the update.

    Args:
        parameters: all that are cut, in the same order in all processes.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        sums = torch.stack([gradient.isfinite().all().logical_not().float() for gradient in gradients])
        anywhere = parameters[0].sharing.sum(sums.sum())
        gradients[0].masked_fill_(anywhere > 0, math.inf)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(p.numel() for p in bucket) + parameter.numel() > BUCKET
        if bucket and (full or parameter.dtype != bucket[0].dtype or parameter.device != bucket[0].device):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
