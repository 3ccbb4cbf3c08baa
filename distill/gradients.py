"""Gradients averaged over processes, once per update.

The networks are not wrapped in ``DistributedDataParallel``: with adapters that are switched, several forward passes
per backward pass and roles that take turns, its reducer waits for gradients that do not come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

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
    if accelerator.num_processes == 1:
        return
    has = torch.tensor([float(p.grad is not None) for p in parameters], device=accelerator.device)
    anywhere = accelerator.reduce(has, "sum").tolist()
    shared = [p for p, count in zip(parameters, anywhere, strict=True) if count]
    for bucket in _buckets(shared):
        flat = torch.cat([_gradient(p).flatten() for p in bucket])
        means = accelerator.reduce(flat, "mean").split([p.numel() for p in bucket])
        for parameter, mean in zip(bucket, means, strict=True):
            parameter.grad = mean.view_as(parameter)


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
