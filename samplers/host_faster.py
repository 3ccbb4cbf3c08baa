"""FasterCache of diffusers during a call: it leaves out the first half of a batch, which has to be unconditional."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .call import CallHook, Step
from .errors import InputError
from .host_call import Hosted, HostHook
from .network import Evaluation, output_tensor
from .rows import NOT_BATCHED

TOLERANCE = 1e-3
"Of the scale that an output was guided by, in its own precision."

DIMENSIONS = {"BCHW": 4, "BCFHW": 5, "BFCHW": 5}


class FasterHook(HostHook):
    """Runs the hooks of FasterCache where both branches of guidance are in one batch.

    Rows that a guidance window leaves alone run as they are.
    """

    def begins(self, evaluation: Evaluation, hosted: Hosted) -> bool:
        """Whether the batch is doubled; then the hook learns which arguments it has to halve.

        Raises:
            InputError: when the pipeline evaluates its branches otherwise, the samples have other dimensions than
                the configuration says, or an argument cannot be halved.
        """
        (denoiser,) = hosted.hooks[""]
        if denoiser.is_guidance_distilled:
            return True
        x = evaluation.x
        if len(x) % 2 or not torch.equal(*x.chunk(2)):
            if evaluation.kept is not None:
                return False
            raise InputError(
                "FasterCacheConfig leaves out the unconditional half of a batch, and this pipeline evaluated a batch "
                "that is not doubled for guidance; use another cache, or set is_guidance_distilled for an unguided one"
            )
        form = denoiser.tensor_format
        if x.ndim != DIMENSIONS[form]:
            raise InputError(
                f"FasterCacheConfig has tensor_format {form!r} and {type(evaluation.network).__name__} is shown "
                f"{x.ndim} dimensions; set another tensor_format, or use another cache where the samples are tokens"
            )
        rows = evaluation.rows
        stacked = {
            name for name, value in evaluation.inputs.items() if name not in NOT_BATCHED and _is_stacked(value, rows)
        }
        for name in stacked:
            if not isinstance(evaluation.inputs[name], Tensor):
                raise InputError(f"FasterCacheConfig cannot halve the argument {name!r}; use another cache")
        denoiser.uncond_cond_input_kwargs_identifiers = tuple(stacked)
        return True


class BranchOrder(CallHook):
    """Refuses a pipeline whose batch has the conditional branch first, by what the scheduler is given.

    With h1 and h2 the halves of the network's output, guidance gives h1 + s (h2 - h1): s >= 1 where the first half is
    unconditional, s <= 0 where it is conditional.
    """

    def __init__(self) -> None:
        self.output: Tensor | None = None
        self.known = False

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        """Keeps what the network gives."""
        output = proceed(evaluation)
        if not self.known:
            self.output = output_tensor(output)
        return output

    def before_step(self, step: Step) -> None:
        """Looks which half the result is on the far side of.

        Raises:
            InputError: when that is the first one, or neither.
        """
        if self.known or self.output is None:
            return
        share = _share(self.output, step.output)
        if share is None:
            return
        if not share >= 1 - TOLERANCE:
            first = "stacks its conditional branch first" if share <= TOLERANCE else "combines its branches otherwise"
            raise InputError(
                f"FasterCacheConfig leaves out the first half of a batch as the unconditional one, and this pipeline "
                f"{first}; use another cache"
            )
        self.known, self.output = True, None


def _share(output: Tensor, given: Tensor) -> float | None:
    """The s of guidance that fits best; None where the halves are the same, NaN where they have another shape.

    Args:
        output: (2 B, ...) what the network gave.
        given: (B, ...) or stacked twice, what the scheduler is given; without the channels of a learned variance, and
            negative in some pipelines.
    """
    given = given.chunk(2)[0] if len(given) == len(output) else given
    first, second = (half[:, : given.shape[1]].double() for half in output.chunk(2))
    if first.shape != given.shape:
        return math.nan
    along = second - first
    size = float((along * along).sum())
    fits = []
    for sign in (1, -1):
        beyond = sign * given.double() - first
        share = float((beyond * along).sum()) / (size or 1)
        fits.append((float((beyond - share * along).norm()), share))
    return min(fits)[1] if size else None


def _is_stacked(value: Any, rows: int) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == rows for leaf in tree_leaves(value))
