"""Running a plan on a stock diffusers pipeline, and taking it off without a trace.

Everything that can fail is prepared on objects of our own before the pipeline is touched. Then the pipeline gets
the prepared scheduler and a subclass of its own class whose ``__call__`` bounds each call: counters start there, and
hooks on the denoiser live only there, also when the call raises.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from torch import nn

from .errors import InputError
from .explicit import grid_adapter
from .part import Run
from .plan import Plan
from .stats import Counter, Stats, count_images
from .wrapped import SchedulerState, wrap_scheduler

_RUNNING: ContextVar[Counter | None] = ContextVar("fewstep_running_call", default=None)
"The count of the call that runs in this thread, so that pipelines that share a network do not see each other."


class PlanWarning(UserWarning):
    """A plan that runs, but not as it was measured."""


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline that predict noise, by component name.

    Raises:
        InputError: when there is none.
    """
    names = ("unet", "transformer", "prior", "denoiser", "decoder_unet")
    found = {
        name: part
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and (name in names or name.startswith(("unet_", "transformer_")))
    }
    if not found:
        raise InputError(f"{type(pipe).__name__} has no denoiser that fewstep knows; looked for {', '.join(names)}")
    return found


def attach(pipe: Any, plan: Plan) -> Attachment:
    """Makes ``pipe`` sample by ``plan`` until the returned handle is detached.

    Args:
        pipe: a diffusers pipeline with a scheduler and a U-Net or transformer.
        plan: what to run; an empty plan runs the pipeline as it is, and counts.

    Returns:
        A handle that is also a context manager: on exit the pipeline is exactly what it was.

    Raises:
        InputError: when the plan cannot run on this pipeline, or one is attached already. The pipeline is as before.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"attach takes a Plan; got {type(plan).__name__}; read one with Plan.load(path)")
    if isinstance(vars(pipe).get("_fewstep_attachment"), Attachment):
        raise InputError(
            "a plan is attached to this pipeline already; call .detach() on its handle first, or join both in one plan"
        )
    if not hasattr(pipe, "scheduler") or not hasattr(pipe, "components"):
        raise InputError(f"attach takes a diffusers pipeline with a scheduler; got {type(pipe).__name__}")
    return Attachment(pipe, plan)


class Attachment:
    """A plan on a pipeline. Made by `attach`.

    Attributes:
        plan: what runs.
        stats: the last call, counted; None before the first one.
        warnings: what the user should know about this plan on this pipeline.
    """

    def __init__(self, pipe: Any, plan: Plan) -> None:
        self.plan = plan
        self.stats: Stats | None = None
        self._pipe: Any = pipe
        self._denoisers = denoisers(pipe)
        self._counter: Counter | None = None
        self._class = type(pipe)
        self._signature = inspect.signature(self._class.__call__)
        run = self._prepare(pipe, plan)
        self.warnings = tuple(run.warnings)
        self._arguments = run.call_arguments
        self._scheduler = run.scheduler
        self._state = self._wrap(run)
        self._apply()
        for sentence in self.warnings:
            warnings.warn(sentence, PlanWarning, stacklevel=3)

    def _prepare(self, pipe: Any, plan: Plan) -> Run:
        run = Run(pipe, copy.deepcopy(pipe.scheduler))
        known = frozenset(self._signature.parameters)
        for part in plan.parts:
            part.prepare(run, known)
        if plan.tuned_for is not None:
            plan.tuned_for.check(run, next(iter(self._denoisers.values())))
        return run

    def _wrap(self, run: Run) -> SchedulerState:
        grid = None if run.timesteps is None else grid_adapter(run.scheduler, run.timesteps)
        state = wrap_scheduler(run.scheduler, grid, self._on_step)
        if grid is not None:
            run.scheduler.set_timesteps(len(grid.timesteps))
        return state

    def _apply(self) -> None:
        """Touches the pipeline: nothing here can fail halfway, each line is one assignment."""
        pipe = self._pipe
        self._kept = pipe.__dict__["scheduler"]
        body = {
            "__module__": self._class.__module__,
            "__qualname__": self._class.__qualname__,
            "__call__": self._call(),
        }
        subclass = type(self._class.__name__, (self._class,), body)
        pipe.__dict__["_fewstep_attachment"] = self
        pipe.__dict__["scheduler"] = self._scheduler
        pipe.__class__ = subclass

    def detach(self) -> None:
        """Restores the pipeline: its class, its scheduler (also when another was assigned meanwhile) and its config.

        A second call does nothing.
        """
        pipe = self._pipe
        if vars(pipe).get("_fewstep_attachment") is not self:
            return
        pipe.__class__ = self._class
        if pipe.scheduler is self._scheduler:
            pipe.__dict__["scheduler"] = self._kept
        else:  # assigned meanwhile, which wrote its name into the pipeline's config
            pipe.scheduler = self._kept
        del pipe.__dict__["_fewstep_attachment"]

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _call(self) -> Callable[..., Any]:
        @functools.wraps(self._class.__call__)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            if pipe.scheduler is not self._scheduler:
                raise InputError("the scheduler was replaced while a plan is attached; detach the plan first")
            bound = self._signature.bind_partial(pipe, *args, **kwargs)
            return self._counted(pipe, args, kwargs | self._merged(bound.arguments))

        return call

    def _merged(self, given: dict[str, Any]) -> dict[str, Any]:
        """The plan's arguments of the call, unless the caller contradicts one of them."""
        for name, value in self._arguments.items():
            if name in given and given[name] != value:
                raise InputError(
                    f"the plan sets {name}={value!r}; got {name}={given[name]!r} in the call; leave it out of the call"
                )
        if "num_inference_steps" in self._arguments:
            for name in ("timesteps", "sigmas"):
                if given.get(name) is not None:
                    raise InputError(f"the plan has a grid; got {name} in the call as well; leave one of them out")
        return {name: value for name, value in self._arguments.items() if name not in given}

    def _counted(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        counter = self._counter = Counter()
        self._state.reset()
        token = _RUNNING.set(counter)
        hooks = [
            net.register_forward_pre_hook(self._on_evaluation, with_kwargs=True) for net in self._denoisers.values()
        ]
        images, finished = 0, False
        try:
            output = self._class.__call__(pipe, *args, **kwargs)
            images, finished = count_images(output), True
            return output
        finally:
            for hook in hooks:
                hook.remove()
            _RUNNING.reset(token)
            self.stats = counter.stats(images, finished, self.warnings)

    def _on_evaluation(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counter = _RUNNING.get()
        if counter is not None and counter is self._counter:
            counter.evaluation(args, kwargs)

    def _on_step(self, timestep: Any) -> None:
        if self._counter is not None:
            self._counter.step(timestep)
