"""A second pass of a pipeline over samples that exist: they are noised again and finished by another plan.

The pass runs on a copy of the pipeline's object that shares its networks, with the plan attached to the copy. What
one pass starts from is handed to the hooks of its call in the context that it runs in.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from .attach import Attachment, PlanWarning, attach
from .call import CallHook, Step
from .errors import InputError
from .network import Evaluation
from .part import Part, Run
from .plan import Plan
from .process import Process


@dataclass(frozen=True)
class Begin:
    """What one pass starts from.

    Attributes:
        x0: (B, ...) clean samples.
        noise: (B, ...) standard normal.
    """

    x0: Tensor
    noise: Tensor


_BEGIN: ContextVar[Begin | None] = ContextVar("fewstep_begin", default=None)
_LANDED: ContextVar[list[Tensor] | None] = ContextVar("fewstep_landed", default=None)


class TeacherPass:
    """A plan that finishes samples, on a pipeline's networks.

    Args:
        pipe: the pipeline, which is not changed.
        plan: what finishes the samples; it has a grid.
        strength: share of the plan's grid that runs, above 0 and at most 1.
        resources: objects that the plan's parts ask for by name.

    Raises:
        InputError: when the plan cannot run on the pipeline.
    """

    def __init__(self, pipe: Any, plan: Plan, strength: float, resources: Mapping[str, Any]) -> None:
        self._pipe = copy.copy(pipe)
        private: dict[str, Part] = {"start": _GivenStart()}
        if strength < 1:
            assert plan.grid is not None
            private["grid"] = _CutGrid(inner=plan.grid, strength=strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlanWarning)  # whoever asks for the pass says it for both
            self.handle: Attachment = attach(self._pipe, plan.model_copy(update=private), resources)

    @property
    def sets(self) -> frozenset[str]:
        """Arguments of the pipeline's call that the plan sets."""
        return frozenset(self.handle._run.call_arguments)

    def run(self, arguments: dict[str, Any], begin: Begin) -> Any:
        """One pass.

        Args:
            arguments: those of the pipeline's call, by name.
            begin: what it starts from.

        Returns:
            The pipeline's output.
        """
        token = _BEGIN.set(begin)
        try:
            return self._pipe(**arguments)
        finally:
            _BEGIN.reset(token)


def landing(run: Run) -> Callable[[Callable[[], Any]], tuple[Any, Tensor]]:
    """Has the calls of ``run`` say which samples they end with.

    Returns:
        A function that runs a call and returns its output and the samples (rows, ...) of its last step, which the
        pipeline would decode; a pipeline that steps both branches of guidance has both there, one after the other.
    """
    run.hooks.append(_Landing)

    def listen(call: Callable[[], Any]) -> tuple[Any, Tensor]:
        landed: list[Tensor] = []
        token = _LANDED.set(landed)
        try:
            output = call()
        finally:
            _LANDED.reset(token)
        if not landed:
            raise InputError("the call took no step of the scheduler; there are no samples to go on from")
        return output, landed[-1]

    return listen


class _Landing(CallHook):
    def __init__(self) -> None:
        self.landed = _LANDED.get()

    def after_step(self, step: Step) -> None:
        """Keeps the samples of the last step so far."""
        if self.landed is not None and step.x_next is not None:
            self.landed[:] = [step.x_next]


class _GivenStart(Part):
    """Starts from the samples of the pass, noised to the first timestep, instead of the pipeline's noise."""

    type: Literal["given"] = "given"

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Adds the hook."""
        process = run.process
        run.hooks.append(lambda: _Start(process, _BEGIN.get()))


@dataclass
class _Start(CallHook):
    process: Process
    begin: Begin | None

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        """Shows the network the noised samples until the first step is taken."""
        if self.begin is not None:
            x = self._x(self.begin, evaluation.x, evaluation.time) * float(self.process.input_scale(evaluation.time))
            evaluation = evaluation.with_inputs(**{evaluation.state_name: x})
        return proceed(evaluation)

    def before_step(self, step: Step) -> None:
        """Takes the first step from the noised samples."""
        if self.begin is not None:
            step.x = self._x(self.begin, step.x, step.time)
            self.begin = None

    def _x(self, begin: Begin, like: Tensor, time: float) -> Tensor:
        """The noised samples, one set for each branch that ``like`` has."""
        if like.shape[1:] != begin.x0.shape[1:] or like.shape[0] % begin.x0.shape[0]:
            raise InputError(
                f"the network is shown {tuple(like.shape)} and the samples are {tuple(begin.x0.shape)}; "
                "a pipeline that adds channels to its samples cannot be escalated"
            )
        x = self.process.add_noise(begin.x0, begin.noise, time)
        return torch.cat([x] * (like.shape[0] // begin.x0.shape[0])).to(like.device, like.dtype)


class _CutGrid(Part):
    """The last points of another grid, as many as diffusers' image-to-image pipelines keep for a strength."""

    type: Literal["cut"] = "cut"
    inner: Part
    strength: float = Field(gt=0, lt=1)

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Prepares the grid, and hands its last points to the run.

        Raises:
            InputError: when the grid cannot be told beforehand, or nothing is left of it.
        """
        self.inner.prepare(run, known_arguments)
        times = run.timesteps or _own_times(run)
        count = int(len(times) * self.strength)
        if not count:
            raise InputError(
                f"strength {self.strength:g} leaves none of the teacher's {len(times)} steps; raise one of them"
            )
        run.timesteps = times[-count:]
        run.call_arguments["num_inference_steps"] = count


def _own_times(run: Run) -> tuple[float, ...]:
    """The timesteps that the scheduler itself makes for the run's number of steps."""
    scheduler = copy.deepcopy(run.scheduler)
    try:
        scheduler.set_timesteps(run.call_arguments["num_inference_steps"])
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{type(scheduler).__name__} does not tell its grid beforehand ({error}); give explicit timesteps"
        ) from None
    times = tuple(float(time) for time in scheduler.timesteps)
    if len(set(times)) != len(times) or getattr(scheduler, "order", 1) != 1:
        raise InputError(
            f"{type(scheduler).__name__} visits times that are no steps of its grid; give explicit timesteps"
        )
    return times
