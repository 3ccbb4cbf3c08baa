"""How a student is sampled: the plan that ships beside its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..samplers import Plan
from ..samplers.errors import InputError
from ..samplers.process import Process
from ..samplers.schedules import EDMSchedule, FlowSchedule, InvertedFlowSchedule, TableSchedule

_CONSISTENCY: dict[type, str] = {
    TableSchedule: "LCMScheduler",
    FlowSchedule: "FlowMatchLCMScheduler",
    EDMSchedule: "EDMDPMSolverMultistepScheduler",
}
_ANCESTRAL: dict[str, Any] = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero"}
_LANDING: dict[type, str] = {
    TableSchedule: "DDIMScheduler",
    FlowSchedule: "FlowMatchEulerDiscreteScheduler",
    EDMSchedule: "EDMEulerScheduler",
}
_TO_CLEAN: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"set_alpha_to_one": True},
    "EDMEulerScheduler": {"final_sigmas_type": "zero"},
}
_TRAJECTORY: dict[type, str] = {TableSchedule: "TCDScheduler", FlowSchedule: "LTXEulerAncestralRFScheduler"}


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


def segment_times(points: Sequence[float], edges: Sequence[int]) -> tuple[float, ...]:
    """The noisy ends of segments, noisiest first: where a student is asked that lands at their clean ends.

    Args:
        points: of the grid, from the cleanest to the noisiest.
        edges: indices of the points where segments begin, rising from 0.
    """
    return tuple(points[edge] for edge in (len(points) - 1, *edges[:0:-1]))


def consistency_plan(process: Process, times: Sequence[float], **config: Any) -> Plan:
    """Multistep consistency sampling (arXiv:2303.01469 algorithm 1): to clean data, and noise again to the next time.

    On EDM, for which diffusers has none that tells the network its time, it is the ancestral step: a draw of
    q(x_s | x_t, x0) keeps (sigma_s/sigma_t)^2 of the state, which is little between few steps.

    Args:
        process: of the pipeline.
        times: noisiest first.
        config: options of the scheduler, such as ``timestep_scaling``.

    Raises:
        InputError: for a process that diffusers has no such scheduler for.
    """
    if isinstance(process.schedule, EDMSchedule):
        config = _ANCESTRAL | config
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
    name = _scheduler(process, _LANDING, "first-order")
    return _plan(name, times, _TO_CLEAN.get(name, {}) | config)


def trajectory_plan(process: Process, times: Sequence[float], eta: float) -> Plan:
    """Strategic stochastic sampling (arXiv:2402.19159 algorithm 4): past the next time, and noise again up to it.

    On a table the student jumps to 1 - eta of the next time, and at last to timestep 0. Along a flow the scheduler has
    an eta of its own: the jump is to sigma_s (1 - eta (1 - sigma_s/sigma_t)), which for eta = 1 is ancestral sampling.

    Args:
        process: of the pipeline.
        times: noisiest first.
        eta: 0 (deterministic) to 1.

    Raises:
        InputError: for a process that diffusers has no such scheduler for.
    """
    if eta == 0 and not isinstance(process.schedule, TableSchedule):
        return landing_plan(process, times)
    if isinstance(process.schedule, EDMSchedule):
        raise InputError(f"diffusers has no stochastic trajectory sampler for EDM; set eta to 0, not {eta:g}")
    return _plan(_scheduler(process, _TRAJECTORY, "trajectory"), times, {"eta": eta})


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
