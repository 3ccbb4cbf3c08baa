"""Running a plan on batches of samples, for searches that measure what comes out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..eval.generate import watch_global_noise
from ..samplers import Plan, PlanWarning, attach
from ..samplers.stats import Stats


class Run(NamedTuple):
    """What one call of the pipeline gave.

    Attributes:
        samples: float32 (B, ...) on the CPU; pictures with channels first, in 0 to 1.
        stats: what was counted.
    """

    samples: Tensor
    stats: Stats


RunBatch = Callable[[Mapping[str, Any], int], Run]
"""From the arguments of a call, and a seed for noise that no generator of the call gives, to what it gave."""


@contextmanager
def running(pipe: Any, plan: Plan, counted: Callable[[Stats], None] = lambda stats: None) -> Iterator[RunBatch]:
    """Attaches a plan for some calls.

    Args:
        pipe: the pipeline, with no plan attached.
        plan: what to run; what it warns of is not shown.
        counted: told what each call counted, also when it raised.

    Raises:
        InputError: when the plan cannot run on the pipeline.
    """
    with warnings.catch_warnings(action="ignore", category=PlanWarning), attach(pipe, plan) as handle:

        def run(arguments: Mapping[str, Any], seed: int) -> Run:
            before = handle.stats
            try:
                with watch_global_noise(pipe.device, seed):
                    output = pipe(**({"output_type": "np"} | dict(arguments)))
            finally:
                if handle.stats is not None and handle.stats is not before:
                    counted(handle.stats)
            assert handle.stats is not None
            return Run(_samples(output), handle.stats)

        yield run


def batches(numbers: range, size: int) -> Iterator[range]:
    """Consecutive numbers of samples, ``size`` at a time."""
    for first in range(0, len(numbers), size):
        yield numbers[first : first + size]


def _samples(output: Any) -> Tensor:
    samples = torch.as_tensor(output[0]).float().cpu()
    return samples.permute(0, 3, 1, 2) if samples.ndim == 4 and samples.shape[-1] in (1, 3) else samples
