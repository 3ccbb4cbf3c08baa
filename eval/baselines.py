"""The rows of a bench: the reference, diffusers' own samplers, the plans, and the fewer-steps controls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..samplers import Plan
from ..samplers.errors import InputError
from .record import Role, check_name
from .timing import Timing

SPACING = "trailing"
"One spacing of the timesteps for all baselines (arXiv:2305.08891 recommends it for few steps)."

VARIANCE_PRESERVING: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("ddim", "DDIMScheduler", {}),
    ("dpmpp-2m", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    ("unipc", "UniPCMultistepScheduler", {}),
    ("euler", "EulerDiscreteScheduler", {}),
)
"Name, scheduler and options of the baselines of a pipeline trained on a variance-preserving process."

FLOW_MATCHING: tuple[tuple[str, str, dict[str, Any]], ...] = (("flow-euler", "FlowMatchEulerDiscreteScheduler", {}),)
"The same for flow matching."


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the row and of its file.
        role: what it is in the comparison.
        plan: how it samples.
        control: name of the row that is this plan's fewer-steps control, once it is known.
    """

    name: str
    role: Role
    plan: Plan
    control: str | None = None


def baseline_rows(pipe: Any, reference: Plan, steps: Iterable[int]) -> list[Row]:
    """Diffusers' samplers at a few numbers of steps, guided as the reference is."""
    flow = "FlowMatch" in type(pipe.scheduler).__name__
    return [
        Row(
            f"{name}-{count}",
            "baseline",
            _plan(f"{name}-{count}", solver, options, count, reference, not flow),
        )
        for count in steps
        for name, solver, options in (FLOW_MATCHING if flow else VARIANCE_PRESERVING)
    ]


def _plan(name: str, scheduler: str, options: dict[str, Any], steps: int, reference: Plan, spaced: bool) -> Plan:
    grid: dict[str, Any] = {"type": "spacing", "steps": steps}
    plan = {
        "fewstep_plan": 1,
        "name": name,
        "solver": {"type": "diffusers", "scheduler": scheduler, "config": options},
        "grid": grid | ({"spacing": SPACING} if spaced else {}),
    }
    guidance = reference.to_json().get("guidance")
    return Plan.from_json(plan | ({"guidance": guidance} if guidance else {}))


def reference_row(plan: Plan) -> Row:
    """The row that the others are compared with."""
    return Row(plan.name or "reference", "reference", plan)


def plan_rows(plans: Iterable[tuple[str, Plan]]) -> list[Row]:
    """Rows of plan files, each given with the stem of its file as a name for the nameless."""
    return [Row(plan.name or stem, "plan", plan) for stem, plan in plans]


class Named(Protocol):
    """What has the name of a row."""

    @property
    def name(self) -> str: ...


def check_names(rows: Sequence[Named]) -> None:
    """Raises ``InputError`` when two rows share a name, or one cannot be a file name."""
    seen: set[str] = set()
    for row in rows:
        check_name(row.name)
        if row.name.lower() in seen:
            raise InputError(f"two rows are called {row.name!r}; give one of the plans another name")
        seen.add(row.name.lower())


def control_steps(plan: Timing, reference: Timing, reference_steps: int) -> int:
    """Steps of the reference's solver that take as long as a plan: latency / latency per step, at least 1."""
    per_step_s = reference.latency_s.median / reference_steps
    return max(1, min(reference_steps, round(plan.latency_s.median / per_step_s)))


def control_row(reference: Plan, steps: int) -> Row:
    """The reference in fewer steps: same solver, same guidance, same spacing.

    Raises:
        InputError: when the reference's grid is no rule for a number of steps.
    """
    plan = reference.to_json()
    grid = plan.get("grid") or {}
    if grid.get("type") != "spacing":
        raise InputError("the reference plan needs a grid of type 'spacing', so that it can be run in fewer steps")
    solver = (plan.get("solver") or {}).get("scheduler", "own")
    name = f"control-{solver.removesuffix('Scheduler').lower()}-{steps}"
    kept = {key: plan[key] for key in ("fewstep_plan", "solver", "guidance") if key in plan}
    return Row(name, "control", Plan.from_json(kept | {"name": name, "grid": grid | {"steps": steps}}))
