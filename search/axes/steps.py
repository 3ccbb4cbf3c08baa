"""What the axes share: how many steps a plan takes, at which timesteps, and positions that are distinct."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import Any

from ...samplers import InputError, Plan, Run
from ...samplers.explicit import grid_adapter


def steps_of(axis: str, plan: Plan) -> int:
    """Number of steps of a plan.

    Args:
        axis: the axis that asks, as the user knows it.
        plan: any plan.

    Raises:
        InputError: when the plan leaves the grid to the pipeline.
    """
    if plan.nominal_steps is None:
        raise InputError(f"the {axis} axis needs to know the number of steps; give the plan a grid part")
    return plan.nominal_steps


def call_options(pipe: Any) -> frozenset[str]:
    """Names of the arguments of a pipeline's call."""
    return frozenset(inspect.signature(type(pipe).__call__).parameters)


def prepared(pipe: Any, plan: Plan) -> Run:
    """A run with the solver and the grid of a plan; the pipeline is not touched.

    Raises:
        InputError: when they cannot work on this pipeline, or the solver cannot run the grid.
    """
    run = Run(pipe, copy.deepcopy(pipe.scheduler), folder=plan.folder)
    for part in (plan.solver, plan.grid):
        if part is not None:
            part.prepare(run, call_options(pipe))
    if run.timesteps is not None:
        grid_adapter(run.scheduler, run.timesteps)
    return run


def timesteps_of(axis: str, pipe: Any, plan: Plan) -> tuple[float, ...]:
    """The timesteps at which a plan evaluates the network, noisiest first, whatever says so.

    Args:
        axis: the axis that asks, as the user knows it.
        pipe: the pipeline that runs the plan.
        plan: any plan with a grid.

    Raises:
        InputError: when the plan has no grid, its solver lists times more than once, or the scheduler's own grid
            depends on the resolution.
    """
    steps, run = steps_of(axis, plan), prepared(pipe, plan)
    if run.timesteps is not None:
        return run.timesteps
    if run.scheduler.config.get("use_dynamic_shifting"):
        raise InputError(
            f"the {axis} axis cannot know the timesteps of a scheduler that shifts by resolution; list them in the plan"
        )
    run.scheduler.set_timesteps(steps)
    times = tuple(float(time) for time in run.scheduler.timesteps)
    if len(times) != steps:
        raise InputError(
            f"{type(run.scheduler).__name__} evaluates the network {len(times)} times in {steps} steps; the {axis} "
            "axis needs a solver with one evaluation a step"
        )
    return times


def distinct(positions: Iterable[int], low: int, high: int) -> tuple[int, ...]:
    """The positions in falling order, those that coincide or leave the range moved as little as that order allows.

    Whatever comes in, the result is strictly decreasing within [low, high]; what is so already stays.

    Args:
        positions: at most ``high - low + 1``, in any order.
        low: the least one allowed.
        high: the greatest one allowed.
    """
    ordered = sorted(positions, reverse=True)
    found: list[int] = []
    for position in ordered:
        found.append(min(position, found[-1] - 1 if found else high))
    return tuple(max(position, low + len(found) - 1 - index) for index, position in enumerate(found))


def rounded(value: float, digits: int) -> float:
    """A value to some decimal digits; zero has no sign."""
    return round(value, digits) + 0.0


def within(axis: str, what: str, value: float, bounds: tuple[float, float], tolerance: float) -> float:
    """A value of a plan as a parameter of an axis.

    Args:
        axis: its name.
        what: the value, in words.
        value: as the plan has it.
        bounds: of the parameter.
        tolerance: how far rounding may have carried the value out of them.

    Raises:
        InputError: when it is outside the bounds.
    """
    low, high = bounds
    if not low - tolerance <= value <= high + tolerance:
        raise InputError(f"the plan's {what} {value:g} is outside the range of the {axis} axis, {low:g} to {high:g}")
    return min(max(value, low), high)
