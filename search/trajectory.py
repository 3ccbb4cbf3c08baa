"""The teacher's fine trajectory, recorded once, as what the error of every coarser step can be told from."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..samplers import ExplicitGrid, InputError, Part, Plan, PlanWarning, attach, explicit_support
from ..samplers.call import CallHook, Step
from ..samplers.part import Run
from ..samplers.process import Process
from ..samplers.recognise import own_option
from ..samplers.rules import cleanest
from ..samplers.schedules import EDMSchedule
from .cache import Call

LEVELS = (-8.0, 8.0)
"log(alpha/sigma) beyond which fine times are no longer even in it."


@dataclass(frozen=True)
class Trajectories:
    """What is known of the states x_i and predictions D_i of clean data at N fine times, and of the end x_N.

    A step of a sampler is a linear combination of them, so that its mean squared error follows from the inner
    products alone; the tensors are not kept.

    Attributes:
        times: N fine times, decreasing, in the scheduler's units.
        process: the forward process.
        gram: float64 (2N + 1, 2N + 1), the inner products of (x_0, ..., x_N, D_0, ..., D_(N-1)), as means over all
            elements of all samples.
        n: samples.
        rows: rows of network evaluations that were spent.
    """

    times: tuple[float, ...]
    process: Process
    gram: Tensor
    n: int
    rows: int

    @property
    def alpha(self) -> Tensor:
        """Factors of the data (N + 1,), 1 at the end; float64."""
        return torch.cat([self.process.alpha(self._times), torch.ones(1, dtype=torch.float64)])

    @property
    def sigma(self) -> Tensor:
        """Factors of the noise (N + 1,), 0 at the end; float64."""
        return torch.cat([self.process.sigma(self._times), torch.zeros(1, dtype=torch.float64)])

    @property
    def start_scale(self) -> Tensor:
        """What x_0 is multiplied with (N,) to be what a pipeline starts from at each time: noise of its own size."""
        if isinstance(self.process.schedule, EDMSchedule):
            return self.sigma[:-1] / self.sigma[0]
        return torch.ones(len(self.times), dtype=torch.float64)

    @property
    def _times(self) -> Tensor:
        return torch.tensor(self.times, dtype=torch.float64)


def prepared_scheduler(pipe: Any, plan: Plan) -> Any:
    """The scheduler that a plan runs on a pipeline.

    Raises:
        InputError: when the plan's solver cannot run.
    """
    run = Run(pipe, copy.deepcopy(pipe.scheduler), folder=plan.folder)
    if plan.solver is not None:
        plan.solver.prepare(run, frozenset(inspect.signature(type(pipe).__call__).parameters))
    return run.scheduler


def fine_times(process: Process, count: int) -> tuple[float, ...]:
    """Times that are even in half of time and half of log-SNR, so that they are dense wherever either is short.

    Args:
        process: the forward process.
        count: at least 2.

    Returns:
        ``count`` strictly decreasing times, from the noisiest to the cleanest that has noise.

    Raises:
        InputError: when ``count`` is below 2.
    """
    if count < 2:
        raise InputError(f"a fine trajectory has at least 2 times; got {count}")
    noisiest, last = process.time_range.noisiest, cleanest(process)
    dense = torch.linspace(noisiest, last, 100 * count + 1, dtype=torch.float64)
    level = (process.log_snr(dense) / 2).clamp(*LEVELS)
    place = (noisiest - dense) / (noisiest - last) + (level - level[0]) / (level[-1] - level[0])
    times = np.interp(np.linspace(0, 2, count), place.numpy(), dense.numpy())
    return tuple(float(time) for time in times)


def record_trajectories(
    pipe: Any,
    plan: Plan,
    call: Call,
    n: int,
    *,
    fine: int | Sequence[float] = 64,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Trajectories:
    """Samples by ``plan`` on fine times and keeps what grids are judged by.

    Args:
        pipe: the pipeline, with no plan attached; as it was afterwards.
        plan: its solver evaluates the network once a step and draws no noise; its guidance, conditioning, correction
            and models run too, its grid, start and caches do not.
        call: from numbers of samples to the arguments of a call for them, seeds included.
        n: samples, at least 1.
        fine: the fine times, or how many (`fine_times`).
        batch_size: samples in a call.
        progress: told the samples done and all of them.

    Raises:
        InputError: when the solver is stochastic or evaluates more than once a step, or as `attach`.
    """
    if n < 1:
        raise InputError(f"trajectories are recorded of at least 1 sample; got {n}")
    scheduler = prepared_scheduler(pipe, plan)
    _require_ode(scheduler)
    process = Process.from_scheduler(scheduler)
    times = fine_times(process, fine) if isinstance(fine, int) else tuple(fine)
    keep = _Keep()
    private = {"grid": ExplicitGrid(timesteps=times), "start": None, "caches": (_Watched(keep=keep),)}
    gram, rows = torch.zeros(2 * len(times) + 1, 2 * len(times) + 1, dtype=torch.float64), 0
    with warnings.catch_warnings(action="ignore", category=PlanWarning):
        attached = attach(pipe, plan.model_copy(update=private))
    with attached as handle:
        for first in range(0, n, batch_size):
            numbers = range(first, min(first + batch_size, n))
            keep.begin(len(numbers))
            pipe(**call(numbers))
            assert handle.stats is not None
            rows += handle.stats.rows
            gram += keep.gram(len(times))
            if progress is not None:
                progress(numbers.stop, n)
    return Trajectories(times, process, gram / n, n, rows)


def _require_ode(scheduler: Any) -> None:
    name = type(scheduler).__name__
    support = {entry.scheduler: entry for entry in explicit_support()}.get(name)
    stochastic = str(own_option(scheduler, "algorithm_type", "")).startswith("sde")
    if support is None or support.order is None or "listed" in support.note or stochastic:
        raise InputError(
            f"{name}{' with ' + scheduler.config.algorithm_type if stochastic else ''} draws noise or evaluates the "
            "network between listed times; record trajectories with DDIMScheduler, DPMSolverMultistepScheduler or "
            "UniPCMultistepScheduler"
        )


class _Keep:
    """The states and predictions of one call."""

    def begin(self, count: int) -> None:
        self.count = count
        self.states: list[Tensor] = []
        self.predictions: list[Tensor] = []
        self.end: Tensor | None = None

    def part(self, tensor: Tensor) -> Tensor:
        """The samples (count, elements); a pipeline that steps both branches of guidance has them twice."""
        part = tensor[: self.count].flatten(1).cpu()
        return part if part.dtype == torch.float64 else part.float()

    def gram(self, times: int) -> Tensor:
        """Inner products, as means over the elements and sums over the samples."""
        if len(self.states) != times or self.end is None or len(self.end) != self.count:
            raise InputError(
                f"the call took {len(self.states)} steps of {0 if self.end is None else len(self.end)} samples for "
                f"{times} times and {self.count} numbers; give one sample for each number, and all of the grid"
            )
        total = torch.zeros(2 * times + 1, 2 * times + 1, dtype=torch.float64)
        for row in range(self.count):
            kept = torch.stack([part[row] for part in (*self.states, self.end, *self.predictions)]).double()
            total += kept @ kept.T / kept.shape[1]
        if not bool(total.isfinite().all()):
            raise InputError("the trajectory has values that are not finite; run the network in a wider dtype")
        return total


class _Watch(CallHook):
    """Keeps what the scheduler is handed, after all other hooks changed it."""

    def __init__(self, keep: _Keep) -> None:
        self.keep = keep

    def before_step(self, step: Step) -> None:
        self.keep.states.append(self.keep.part(step.x))
        self.keep.predictions.append(self.keep.part(step.x0()))

    def after_step(self, step: Step) -> None:
        assert step.x_next is not None
        self.keep.end = self.keep.part(step.x_next)


class _Watched(Part):
    """Watches the calls. Not registered: it is in no plan that is saved."""

    type: Literal["watched"] = "watched"
    keep: Any

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        run.hooks.append(lambda: _Watch(self.keep))
