"""The lines of Python that sample a student by its plan with diffusers alone, where diffusers can."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.utils import logging
from torch import Tensor

from ..samplers import ConstantGuidance, DiffusersSolver, ExplicitGrid, Plan, Process, Run, SpacingGrid
from ..samplers.explicit import grid_adapter
from ..samplers.schedules import TableSchedule
from ..samplers.solver import make_scheduler, scheduler_class
from ..samplers.wrapped import wrap_scheduler

_SPACINGS = ("trailing", "leading", "linspace")
_TOLERANCE = 1e-4
"Of states, relative too: a scheduler that looks its alphas up in float32 is off by less."


@dataclass(frozen=True)
class StockSampling:
    """How a stock pipeline takes the steps of a plan.

    Attributes:
        scheduler: class name in diffusers; None for the pipeline's own.
        imports: lines that the others need, besides those of diffusers.
        setup: lines that give the pipeline ``pipe`` its scheduler.
        arguments: of the pipeline's call, besides what is to be seen.
    """

    scheduler: str | None
    imports: tuple[str, ...]
    setup: tuple[str, ...]
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class _Way:
    """Options of a scheduler, and what it is told its times by."""

    options: dict[str, Any]
    by: Literal["number", "timesteps", "sigmas"]
    values: Any

    @property
    def keyword(self) -> str:
        return "num_inference_steps" if self.by == "number" else self.by


@dataclass(frozen=True)
class _Course:
    """What a scheduler did: its times (n,), and the states (n, ...) that it stepped to."""

    times: Tensor
    states: Tensor

    def same(self, other: _Course) -> bool:
        return self.times.shape == other.times.shape and (
            torch.allclose(self.times, other.times, rtol=0, atol=1e-3)
            and torch.allclose(self.states, other.states, rtol=_TOLERANCE, atol=_TOLERANCE)
        )


def stock_sampling(pipe: Any, plan: Plan) -> StockSampling | None:
    """The lines that make a stock pipeline sample by a plan of `Method.plan`.

    Each way of telling a scheduler its steps is tried on numbers: it is taken when it gives the times and the states
    of the plan.

    Args:
        pipe: a pipeline of the class that is to run it.
        plan: whose weights and provenance do not matter.

    Returns:
        The lines; None when diffusers cannot run these steps.
    """
    known = {"weights", "solver", "grid", "guidance"}
    if plan.grid is None or any(name not in known for name, _ in plan.placed):
        return None
    run = Run(pipe, copy.deepcopy(pipe.scheduler))
    config: dict[str, Any] = {}
    cls: Any = type(pipe.scheduler)
    if isinstance(plan.solver, DiffusersSolver):
        plan.solver.prepare(run, frozenset())
        config, cls = dict(plan.solver.config), scheduler_class(plan.solver.scheduler)
    options = inspect.signature(cls.__init__).parameters
    made = {name: value for name, value in config.items() if name in options}
    stepped = {name: value for name, value in config.items() if name not in options}
    if isinstance(plan.grid, SpacingGrid):
        spacing = {} if plan.grid.spacing is None else {"timestep_spacing": plan.grid.spacing}
        return _written(pipe, plan, cls, made, stepped, _Way(spacing, "number", plan.grid.steps))
    if not isinstance(plan.grid, ExplicitGrid):
        return None
    times = plan.grid.timesteps
    wrap_scheduler(run.scheduler, grid_adapter(run.scheduler, times))
    with _quiet():
        wanted = _course(run.scheduler, {"num_inference_steps": len(times)}, {})
        for way in _ways(cls, times, Process.from_scheduler(pipe.scheduler)):
            stock: Any = copy.deepcopy(make_scheduler(cls, pipe.scheduler, made | way.options))
            got = _course(stock, {way.keyword: way.values}, stepped)
            if got is not None and wanted is not None and got.same(wanted):
                return _written(pipe, plan, cls, made, stepped, way)
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' warnings of what is tried and not taken."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _ways(cls: Any, times: tuple[float, ...], process: Process) -> Iterator[_Way]:
    options = inspect.signature(cls.__init__).parameters
    takes = inspect.signature(cls.set_timesteps).parameters
    if isinstance(process.schedule, TableSchedule):  # elsewhere pipelines hand over sigmas of their own
        yield _Way({}, "number", len(times))
        if "timestep_spacing" in options:
            for spacing in _SPACINGS:
                yield _Way({"timestep_spacing": spacing}, "number", len(times))
        if "timesteps" in takes:
            yield _Way({}, "timesteps", [int(time) if time.is_integer() else time for time in times])
    elif "sigmas" in takes:
        plain = {name: value for name, value in (("shift", 1.0), ("use_dynamic_shifting", False)) if name in options}
        sigmas = [round(float(process.sigma(time)), 8) for time in times]
        yield _Way(plain, "sigmas", sigmas)
        yield _Way(plain, "sigmas", [*sigmas, 0.0])


def _course(scheduler: Any, times: Mapping[str, Any], stepped: Mapping[str, Any]) -> _Course | None:
    """A sampling with a network made up here; None when the scheduler refuses.

    Args:
        scheduler: with or without a grid of ours.
        times: arguments of its ``set_timesteps``.
        stepped: arguments of its ``step``.
    """
    generator = torch.Generator().manual_seed(0)
    own = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    try:
        scheduler.set_timesteps(**times)
        x = torch.randn(1, 4, 4, 4, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        states = []
        for t in scheduler.timesteps:
            shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(torch.tanh(shown + float(t) / 1000), t, x, **own, **stepped).prev_sample
            states.append(x)
    except (ValueError, IndexError, TypeError, RuntimeError, AssertionError):
        return None
    return _Course(scheduler.timesteps.double(), torch.stack(states))


def _written(
    pipe: Any, plan: Plan, cls: Any, made: Mapping[str, Any], stepped: Mapping[str, Any], way: _Way
) -> StockSampling:
    """The lines of a way that is right."""
    called = inspect.signature(type(pipe).__call__).parameters
    told = "".join(f", {key}={value!r}" for key, value in {**made, **way.options}.items())
    own = plan.solver is None and not told
    setup = [] if own else [f"pipe.scheduler = {cls.__name__}.from_config(pipe.scheduler.config{told})"]
    argument = f"{way.keyword}={way.values!r}"
    if way.keyword in called:
        arguments = [argument]
    else:  # the pipeline hands over a number of steps, and the scheduler takes its own list
        setup += [
            "set_timesteps = pipe.scheduler.set_timesteps",
            f"pipe.scheduler.set_timesteps = lambda *_, **__: set_timesteps({argument}, device=pipe.device)",
        ]
        arguments = [f"num_inference_steps={plan.nominal_steps}"]
    imports = []
    for key, value in stepped.items():
        if key in called:
            arguments.append(f"{key}={value!r}")
        else:
            imports = ["from functools import partial"]
            setup.append(f"pipe.scheduler.step = partial(pipe.scheduler.step, {key}={value!r})")
    if isinstance(plan.guidance, ConstantGuidance):
        arguments.append(f"guidance_scale={plan.guidance.scale!r}")
    return StockSampling(None if own else cls.__name__, tuple(imports), tuple(setup), tuple(arguments))
