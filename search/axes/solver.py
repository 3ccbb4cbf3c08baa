"""The solver as an axis: one of some schedulers with their options."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.trial import BaseTrial

from ...samplers import DiffusersSolver, ExplicitGrid, InputError, Plan, Process
from ...samplers.explicit_base import WARPS
from ...samplers.schedules import FlowSchedule
from ..space import AXES
from .steps import prepared

Choices = tuple[tuple[str, DiffusersSolver], ...]
"Solvers by the names that trials know them by."

PLACES_THE_GRID = frozenset({*WARPS, "timestep_spacing", "steps_offset", "shift", "flow_shift"})
"Options that change nothing but a scheduler's own grid, and so nothing on an explicit one."


def _made(scheduler: str, options: Mapping[str, Mapping[str, Any]]) -> Choices:
    return tuple((name, DiffusersSolver(scheduler=scheduler, config=dict(config))) for name, config in options.items())


MULTISTEP: Choices = (
    *_made(
        "DPMSolverMultistepScheduler",
        {
            "dpmpp-2m": {"solver_order": 2, "solver_type": "midpoint"},
            "dpmpp-2m-heun": {"solver_order": 2, "solver_type": "heun"},
            "dpmpp-3m": {"solver_order": 3, "solver_type": "midpoint"},
        },
    ),
    *_made(
        "UniPCMultistepScheduler",
        {
            "unipc-2": {"solver_order": 2, "solver_type": "bh2"},
            "unipc-3": {"solver_order": 3, "solver_type": "bh2"},
        },
    ),
)
"One evaluation a step, on variance preserving processes and on flow matching."

VARIANCE_PRESERVING: Choices = (
    *_made("DDIMScheduler", {"ddim": {}}),
    *MULTISTEP,
    *_made(
        "UniPCMultistepScheduler",
        {
            f"unipc-{order}-bh1": {"solver_order": order, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}
            for order in (2, 3)
        },
    ),
    *_made("DEISMultistepScheduler", {f"deis-{order}": {"solver_order": order} for order in (2, 3)}),
    *_made("SASolverScheduler", {"sa-solver": {"predictor_order": 2, "corrector_order": 2}}),
)
"""Solvers of variance preserving processes with one evaluation a step.

UniPC's bh1 ends at the smallest noise level, for its coefficient of a step to clean data is infinite. SA-Solver adds
noise between timesteps 200 and 800, from the generators of the call.
"""

_ON_FLOW: dict[str, bool | int | float | str | list[float] | None] = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}

FLOW: Choices = (
    *_made("FlowMatchEulerDiscreteScheduler", {"euler": {}}),
    *((name, DiffusersSolver(scheduler=part.scheduler, config=part.config | _ON_FLOW)) for name, part in MULTISTEP),
)
"""Solvers of flow matching with one evaluation a step. DEIS and SA-Solver stop at the last listed time there, with
noise left in the sample."""


@dataclass(frozen=True)
class SolverAxis:
    """One of some solvers, the categorical parameter ``solver.name``.

    Attributes:
        pipe: the pipeline that they run on.
        choices: of which to choose.
        name: of the axis.
    """

    pipe: Any
    choices: Choices
    name: str = "solver"

    def __post_init__(self) -> None:
        names = [name for name, _ in self.choices]
        if not names or len(set(names)) != len(names):
            raise InputError(f"the {self.name} axis has one or more solvers of different names; got {names}")

    @classmethod
    def of(cls, pipe: Any, base: Plan) -> SolverAxis:
        """The axis of the solvers that run explicit grids on a pipeline, from `VARIANCE_PRESERVING` or `FLOW`.

        Solvers begin and end with lower orders, so that one of order 3 is one of order 2 in fewer than 5 steps; it is
        left out there.

        Raises:
            InputError: when none does.
        """
        process = prepared(pipe, base.model_copy(update={"grid": None})).process
        known = FLOW if isinstance(process.schedule, FlowSchedule) else VARIANCE_PRESERVING
        highest = 3 if base.nominal_steps is None or base.nominal_steps >= 5 else 2
        reached = [(name, part) for name, part in known if part.config.get("solver_order", 1) in range(1, highest + 1)]
        suited = ((name, _suited(pipe, part, process)) for name, part in reached)
        choices = tuple((name, part) for name, part in suited if part is not None)
        if not choices:
            raise InputError(
                f"no solver that the solver axis knows samples with {type(pipe.scheduler).__name__}'s noise levels and "
                f"{process.prediction_type} predictions; give choices of your own: SolverAxis(pipe, choices)"
            )
        return cls(pipe, choices)

    def suggest(self, trial: BaseTrial, plan: Plan) -> Plan:
        """The plan with the solver that the trial suggests."""
        chosen = trial.suggest_categorical(f"{self.name}.name", [name for name, _ in self.choices])
        return plan.model_copy(update={"solver": dict(self.choices)[chosen]})

    def params(self, plan: Plan) -> dict[str, Any]:
        """The name of a plan's solver, or of the pipeline's own where the plan has none.

        Options that only place a scheduler's own grid are not compared.

        Raises:
            InputError: when it is not one of the choices.
        """
        wanted = _options(self.pipe, plan)
        for name, options in self._known.items():
            if options == wanted:
                return {f"{self.name}.name": name}
        scheduler = wanted[0]
        config = getattr(plan.solver, "config", {})
        raise InputError(
            f"the plan's solver {scheduler} with {config} is not among the choices of the {self.name} axis: "
            f"{', '.join(self._known)}"
        )

    @cached_property
    def _known(self) -> dict[str, tuple[str, dict[str, Any]]]:
        return {name: _options(self.pipe, Plan(solver=part)) for name, part in self.choices}


def _suited(pipe: Any, part: DiffusersSolver, process: Process) -> DiffusersSolver | None:
    """The solver with no grid of its own, or None where it has other noise levels or the pipeline cannot run it."""
    middle = sum(process.time_range) / 2
    try:
        run = prepared(pipe, Plan(solver=part))
        known = inspect.signature(type(run.scheduler).__init__).parameters
        own = {option: False for option in WARPS if option in known and run.scheduler.config.get(option)}
        if "clip_sample" in run.scheduler.config and "clip_sample" not in pipe.scheduler.config:
            own["clip_sample"] = False  # which DDIM does by default, and the pipeline's scheduler does not
        part = part.model_copy(update={"config": part.config | own})
        run = prepared(pipe, Plan(solver=part, grid=ExplicitGrid(timesteps=(middle,))))
    except InputError:
        return None
    same = math.isclose(float(run.process.log_snr(middle)), float(process.log_snr(middle)), abs_tol=1e-4)
    return part if same and run.process.prediction == process.prediction else None


def _options(pipe: Any, plan: Plan) -> tuple[str, dict[str, Any]]:
    """Class and options of the scheduler that a plan runs, as far as an explicit grid depends on them."""
    scheduler = prepared(pipe, plan.model_copy(update={"grid": None})).scheduler
    options = {key: value for key, value in scheduler.config.items() if key[0] != "_" and key not in PLACES_THE_GRID}
    return type(scheduler).__name__, options


AXES.register("solver")(SolverAxis.of)
