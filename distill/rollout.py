"""The student's own sampling inside training, from noise through its deployed times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..samplers.errors import InputError
from ..samplers.process import Process
from .conditions import Condition
from .jumps import Denoiser
from .method import Moment

Gradient = Literal["none", "last", "all"]
"""Through which of the student's calls a loss on its sample reaches it."""


@dataclass(frozen=True)
class Rollout:
    """Calls of the student at some times, from noise to a clean sample.

    Args:
        process: the noise levels.
        times: where the student is asked, noisiest first; at least one.
        fresh: whether the next state is the clean sample under fresh noise, as consistency models are sampled
            (arXiv:2303.01469 algorithm 1) and DMD2 simulates it in training (arXiv:2405.14867); else it is the
            deterministic landing (arXiv:2010.02502 equation 12).
        checkpointed: whether calls are run again in the backward pass instead of keeping what they computed.

    Raises:
        InputError: when there are no times.
    """

    process: Process
    times: Sequence[float]
    fresh: bool = True
    checkpointed: bool = False

    def __post_init__(self) -> None:
        if not self.times:
            raise InputError("a rollout needs at least one time; got none")

    def __call__(self, student: Denoiser, x: Tensor, noise: Callable[[], Tensor], gradient: Gradient) -> Tensor:
        """The clean samples that the last call gives, (B, ...), at least float32.

        Args:
            student: asked at each time.
            x: states (B, ...) at the first time (`start`).
            noise: draws standard normal noise, shape of x; not called for deterministic landings.
            gradient: through which calls it flows.

        Raises:
            InputError: when shapes disagree or a time is not permitted.
        """
        recorded = torch.is_grad_enabled()
        state, end = x, len(self.times) - 1
        for index, time in enumerate(self.times):
            t = torch.full((len(x),), time, dtype=torch.float64)
            through = gradient == "all" or (gradient == "last" and index == end)
            with torch.set_grad_enabled(recorded and through):
                asked = (state, t)
                x0, eps = checkpoint(student, *asked, use_reentrant=False) if self.checkpointed else student(*asked)
                if index < end:
                    state = self.process.add_noise(x0, noise() if self.fresh else eps, self.times[index + 1])
        return x0


def start(process: Process, condition: Condition, moment: Moment) -> Tensor:
    """The noise that pipelines start from, (B, ...) float32, by the moment's generators.

    Of unit variance, and on EDM sqrt(1 + sigma_max^2) times it: what diffusers' schedulers begin with.

    Args:
        process: of the pipeline.
        condition: of the samples.
        moment: whose draws they are.
    """
    return started(process, moment.rows(lambda generator: torch.randn(condition.layout.shape, generator=generator)))


def started(process: Process, noise: Tensor) -> Tensor:
    """What pipelines start from when their unit noise is ``noise``, of its shape."""
    return _size(process, process.time_range.noisiest) * noise


def check_start(process: Process, time: float) -> None:
    """Refuses a first time at which the student would not be shown what pipelines start from.

    Raises:
        InputError: for a time other than the noisiest, but where noised data of any time have unit variance.
    """
    noisiest = process.time_range.noisiest
    if time != noisiest and abs(_size(process, time) / _size(process, noisiest) - 1) > 1e-6:
        raise InputError(
            f"the first time is {time:g}, but pipelines of this process start from the noise of time {noisiest:g}; "
            "start there"
        )


def _size(process: Process, time: float) -> float:
    """Standard deviation of data of unit variance under the noise of a time."""
    return float((process.alpha(time) ** 2 + process.sigma(time) ** 2).sqrt())
