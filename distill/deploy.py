"""How a student is sampled: the plan that ships beside its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..samplers import Plan
from ..samplers.errors import InputError
from ..samplers.process import Process
from ..samplers.schedules import EDMSchedule, FlowSchedule, InvertedFlowSchedule, TableSchedule

_CONSISTENCY = {TableSchedule: "LCMScheduler", FlowSchedule: "FlowMatchLCMScheduler"}
_LANDING = {
    TableSchedule: "DDIMScheduler",
    FlowSchedule: "FlowMatchEulerDiscreteScheduler",
    EDMSchedule: "EDMEulerScheduler",
}


def spread(points: Sequence[float], steps: int) -> tuple[float, ...]:
    """``steps`` times of a training grid to deploy at, noisiest first, as ``LCMScheduler`` picks its own.

    A student is asked only where it was trained: point N - floor(k N / steps) of N intervals for k = 0, 1, ...

    Args:
        points: of the grid, from the cleanest to the noisiest; the first is not asked.
        steps: 1 to the number of intervals.

    Raises:
        InputError: for other numbers of steps.
    """
    intervals = len(points) - 1
    if not 1 <= steps <= intervals:
        raise InputError(f"the student was trained at {intervals} times, and cannot be sampled in {steps} steps")
    return tuple(points[intervals - step * intervals // steps] for step in range(steps))


def consistency_plan(process: Process, times: Sequence[float], **config: Any) -> Plan:
    """Multistep consistency sampling (arXiv:2303.01469 algorithm 1): to clean data, and noise again to the next time.

    Args:
        process: of the pipeline.
        times: noisiest first.
        config: options of the scheduler, such as ``timestep_scaling``.

    Raises:
        InputError: for a process that diffusers has no such scheduler for.
    """
    return _plan(_scheduler(process, _CONSISTENCY, "consistency"), times, config)


def landing_plan(process: Process, times: Sequence[float], **config: Any) -> Plan:
    """The student's own jumps, one after the other: DDIM, or Euler along a flow.

    Args:
        process: of the pipeline.
        times: noisiest first; the last jump lands on clean data.
        config: options of the scheduler.

    Raises:
        InputError: for a process that diffusers has no such scheduler for.
    """
    return _plan(_scheduler(process, _LANDING, "first-order"), times, config)


def unguided(plan: Plan) -> Plan:
    """The plan with guidance switched off: the student has the teacher's guidance in its weights."""
    return Plan.from_json(plan.to_json() | {"guidance": {"type": "constant", "scale": 1.0}})


def _scheduler(process: Process, table: dict[type, str], what: str) -> str:
    schedule = process.schedule
    name = None if isinstance(schedule, InvertedFlowSchedule) else table.get(type(schedule))
    if name is None:
        raise InputError(f"diffusers has no {what} scheduler for {type(schedule).__name__}; sample with your own")
    return name


def _plan(scheduler: str, times: Sequence[float], config: dict[str, Any]) -> Plan:
    solver = {"type": "diffusers", "scheduler": scheduler, "config": config}
    grid = {"type": "explicit", "timesteps": list(times)}
    return Plan.from_json({"fewstep_plan": 1, "solver": solver, "grid": grid})
