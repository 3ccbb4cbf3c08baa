"""The lines of Python that sample a student by its plan with diffusers alone, where diffusers can."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..samplers import ConstantGuidance, DiffusersSolver, ExplicitGrid, Plan, Process, Run
from ..samplers.explicit import grid_adapter
from ..samplers.solver import make_scheduler, scheduler_class
from ..samplers.wrapped import wrap_scheduler

_SPACINGS = ("trailing", "leading", "linspace")
_TOLERANCE = 1e-4
"Of states, relative too: a scheduler that looks its alphas up in float32 is off by less."


@dataclass(frozen=True)
class StockSampling:
    """How a stock pipeline takes the steps of a plan.

    Attributes:
        scheduler: class name in diffusers.
        imports: lines that the others need, besides those of diffusers.
        setup: lines that give the pipeline ``pipe`` its scheduler.
        arguments: of the pipeline's call, besides what is to be seen.
    """

    scheduler: str
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
        plan: with a solver of diffusers and an explicit grid; weights and provenance do not matter.

    Returns:
        The lines; None when diffusers cannot run these steps.
    """
    solver, grid = plan.solver, plan.grid
    known = {"weights", "solver", "grid", "guidance"}
    if not isinstance(solver, DiffusersSolver) or not isinstance(grid, ExplicitGrid):
        return None
    if any(name not in known for name, _ in plan.placed):
        return None
    cls: Any = scheduler_class(solver.scheduler)
    run = Run(pipe, copy.deepcopy(pipe.scheduler))
    solver.prepare(run, frozenset())
    ours = run.scheduler
    made = {name: value for name, value in solver.config.items() if name in inspect.signature(cls.__init__).parameters}
    stepped = {name: value for name, value in solver.config.items() if name not in made}
    wrap_scheduler(ours, grid_adapter(ours, grid.timesteps))
    wanted = _course(ours, {"num_inference_steps": len(grid.timesteps)}, {})
    for way in _ways(cls, grid.timesteps, Process.from_scheduler(pipe.scheduler)):
        options = made | way.options
        stock: Any = copy.deepcopy(make_scheduler(cls, pipe.scheduler, options))
        got = _course(stock, {way.keyword: way.values}, stepped)
        if got is not None and wanted is not None and got.same(wanted):
            return _written(pipe, plan, solver.scheduler, options, stepped, way)
    return None


def _ways(cls: Any, times: tuple[float, ...], process: Process) -> Iterator[_Way]:
    options = inspect.signature(cls.__init__).parameters
    takes = inspect.signature(cls.set_timesteps).parameters
    if "sigmas" in takes:  # pipelines hand over sigmas of their own where none are given
        plain = {name: value for name, value in (("shift", 1.0), ("use_dynamic_shifting", False)) if name in options}
        yield _Way(plain, "sigmas", [round(float(process.sigma(time)), 8) for time in times])
        return
    yield _Way({}, "number", len(times))
    if "timestep_spacing" in options:
        for spacing in _SPACINGS:
            yield _Way({"timestep_spacing": spacing}, "number", len(times))
    if "timesteps" in takes:
        yield _Way({}, "timesteps", [int(time) if time.is_integer() else time for time in times])


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
    pipe: Any, plan: Plan, name: str, options: Mapping[str, Any], stepped: Mapping[str, Any], way: _Way
) -> StockSampling:
    """The lines of a way that is right."""
    called = inspect.signature(type(pipe).__call__).parameters
    told = "".join(f", {key}={value!r}" for key, value in options.items())
    setup = [f"pipe.scheduler = {name}.from_config(pipe.scheduler.config{told})"]
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
    return StockSampling(name, tuple(imports), tuple(setup), tuple(arguments))
