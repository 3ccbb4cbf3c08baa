"""Running a plan on a stock diffusers pipeline, and taking it off without a trace.

Everything that can fail is prepared on objects of our own before the pipeline is touched. Then the pipeline gets
the prepared scheduler, the networks that a plan brings, and a subclass of its own class whose ``__call__`` bounds each
call: counters and hooks start there, and the denoiser is listened to only there, also when the call raises.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from .call import Call
from .errors import InputError
from .explicit import grid_adapter
from .explicit_base import GridAdapter
from .network import denoisers, listening
from .part import Run
from .plan import Plan
from .stats import Counter, Stats, count_images
from .suited import check_solver
from .wrapped import SchedulerState, wrap_scheduler


class PlanWarning(UserWarning):
    """A plan that runs, but not as it was measured."""


def attach(pipe: Any, plan: Plan, resources: Mapping[str, Any] | None = None) -> Attachment:
    """Makes ``pipe`` sample by ``plan`` until the returned handle is detached.

    Args:
        pipe: a diffusers pipeline with a scheduler and a U-Net or transformer.
        plan: what to run; an empty plan runs the pipeline as it is, and counts.
        resources: objects that parts of the plan ask for by name, such as a second network.

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
    return Attachment(pipe, plan, resources or {})


class Attachment:
    """A plan on a pipeline. Made by `attach`.

    Attributes:
        plan: what runs.
        stats: the last call, counted; None before the first one.
        warnings: what the user should know about this plan on this pipeline.
    """

    def __init__(self, pipe: Any, plan: Plan, resources: Mapping[str, Any]) -> None:
        self.plan = plan
        self.stats: Stats | None = None
        self._pipe: Any = pipe
        self._class = type(pipe)
        self._signature = inspect.signature(self._class.__call__)
        self._run = self._prepare(pipe, plan, resources)
        self._denoisers = denoisers(self._run.pipe)
        self.warnings = tuple(self._run.warnings)
        self._scheduler = self._run.scheduler
        self._process = self._run.process if self._run.hooks else None
        self._state = self._wrap(self._run)
        self._apply()
        for sentence in self.warnings:
            warnings.warn(sentence, PlanWarning, stacklevel=3)

    def _prepare(self, pipe: Any, plan: Plan, resources: Mapping[str, Any]) -> Run:
        own = next(iter(denoisers(pipe).values()))
        run = Run(pipe, copy.deepcopy(pipe.scheduler), resources=resources, folder=plan.folder)
        known = frozenset(self._signature.parameters)
        for part in plan.parts:
            part.prepare(run, known)
        if plan.solver is not None:
            check_solver(pipe.scheduler, run.scheduler)
        if plan.tuned_for is not None:
            plan.tuned_for.check(run, own)
        return run

    def _wrap(self, run: Run) -> SchedulerState:
        grid = None if run.timesteps is None else grid_adapter(run.scheduler, run.timesteps)
        state = wrap_scheduler(run.scheduler, grid, by_number="num_inference_steps" in run.call_arguments)
        if grid is not None:
            run.scheduler.set_timesteps(len(grid.timesteps))
        return state

    def _apply(self) -> None:
        """Touches the pipeline: nothing here can fail halfway, each line is one assignment."""
        pipe = self._pipe
        self._given = {"scheduler": self._scheduler, **self._run.networks}
        self._kept = {name: pipe.__dict__[name] for name in self._given}
        body = {
            "__module__": self._class.__module__,
            "__qualname__": self._class.__qualname__,
            "__call__": self._call(),
        }
        subclass = type(self._class.__name__, (self._class,), body)
        pipe.__dict__["_fewstep_attachment"] = self
        pipe.__dict__.update(self._given)
        pipe.__class__ = subclass

    def detach(self) -> None:
        """Restores the pipeline: its class, scheduler and networks (also when others were assigned) and its config.

        A second call does nothing.
        """
        pipe = self._pipe
        if vars(pipe).get("_fewstep_attachment") is not self:
            return
        pipe.__class__ = self._class
        for name, kept in self._kept.items():
            if pipe.__dict__[name] is self._given[name]:
                pipe.__dict__[name] = kept
            else:  # assigned meanwhile, which wrote its name into the pipeline's config
                setattr(pipe, name, kept)
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
            kwargs |= self._merged(bound.arguments)
            counter = Counter()
            output, images = None, 0
            try:
                if self._run.arounds:
                    arguments = self._signature.bind_partial(pipe, *args, **kwargs).arguments
                    arguments.pop(next(iter(arguments)))
                    output = _Sampling(self, counter).run(arguments | arguments.pop("kwargs", {}))
                else:
                    output = self.sample(args, kwargs, counter)
                images = count_images(output)
                return output
            finally:
                self.stats = counter.stats(images, output is not None, self.warnings)

        return call

    def _merged(self, given: dict[str, Any]) -> dict[str, Any]:
        """The plan's arguments of the call, unless the caller contradicts one of them."""
        for name, value in self._run.call_arguments.items():
            if name in given and given[name] != value:
                raise InputError(
                    f"the plan sets {name}={value!r}; got {name}={given[name]!r} in the call; leave it out of the call"
                )
        if "num_inference_steps" in self._run.call_arguments:
            for name in ("timesteps", "sigmas"):
                if given.get(name) is not None:
                    raise InputError(f"the plan has a grid; got {name} in the call as well; leave one of them out")
        return {name: value for name, value in self._run.call_arguments.items() if name not in given}

    def sample(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], counter: Counter, grid: GridAdapter | None = None
    ) -> Any:
        """One call of the pipeline's own ``__call__``, listened to and counted.

        Args:
            args: positional arguments.
            kwargs: the others, those of the plan among them.
            counter: what to count on.
            grid: an explicit grid that runs instead of the plan's, or None.

        Returns:
            The pipeline's output.
        """
        hooks = tuple(make() for make in self._run.hooks)
        generator = self._signature.bind_partial(self._pipe, *args, **kwargs).arguments.get("generator")
        caches = tuple(make() for make in self._run.caches)
        call = Call(
            self._denoisers, self._scheduler, hooks, self._process, generator, counter, caches, self._run.additions
        )
        self._state.begin(call, grid)
        try:
            with listening(call.modules, call):
                return self._class.__call__(self._pipe, *args, **kwargs)
        finally:
            self._state.begin(None)


@dataclass
class _Sampling:
    """The rest of a plan, for the arounds: each is handed the ones after it, and the last one the pipeline."""

    attachment: Attachment
    counter: Counter
    depth: int = field(default=0)
    grid: GridAdapter | None = None

    def run(self, arguments: dict[str, Any], grid: GridAdapter | None = None) -> Any:
        arounds, grid = self.attachment._run.arounds, grid or self.grid
        if self.depth == len(arounds):
            return self.attachment.sample((), arguments, self.counter, grid)
        return arounds[self.depth](arguments, _Sampling(self.attachment, self.counter, self.depth + 1, grid))

    def add(self, stats: Stats) -> None:
        self.counter.add(stats)
