"""Timestep aligner: the network is told a learned multiple of the step's time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from .call import CallHook
from .conditioning import CONDITIONINGS
from .errors import InputError
from .hook_tools import train_steps
from .network import Evaluation
from .part import Part, Run


@CONDITIONINGS.register("aligner")
class Aligner(Part):
    """At step i the network is told t_i * r_i; the solver's coefficients stay (arXiv:2310.09469).

    Ratios are learned for one network, solver, number of steps and guidance: `search.aligner.fit_aligner` fits them
    and writes all of that down here and in the plan's ``tuned_for``. Used with another solver or guidance, the plan
    warns. The plan takes as many steps as there are ratios. Solvers that evaluate the network more than once a step
    are refused: their inner evaluations are at other times, for which no ratio was learned. On the demo ``fashion-dit``
    it takes 4 to 5 % off fd_fashion (docs/samplers.md).
    """

    type: Literal["aligner"] = "aligner"
    ratios: tuple[float, ...] = Field(min_length=1, description="One for each step, in its order; 1 changes nothing.")
    solver: str | None = Field(default=None, description="Class name of the scheduler that they were fitted with.")
    guidance: float | None = Field(default=None, description="Guidance scale that they were fitted with.")

    @field_validator("ratios")
    @classmethod
    def _positive(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        for index, ratio in enumerate(ratios):
            if ratio <= 0:
                raise ValueError(f"ratios must be positive; got {ratio:g} at index {index}")
        return ratios

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Sets the number of steps where the plan has no grid, and adds the hook.

        Raises:
            InputError: when the ratios do not fit the grid or the solver, or the process has no train steps.
        """
        train_steps("aligner", run.process)
        name = type(run.scheduler).__name__
        if getattr(run.scheduler, "order", 1) != 1 or name == "PNDMScheduler":
            raise InputError(
                f"{name} evaluates the network at times between its steps; the aligner part needs a solver with one "
                "evaluation a step, such as DDIMScheduler or DPMSolverMultistepScheduler"
            )
        steps = run.call_arguments.get("num_inference_steps", len(self.ratios))
        if steps != len(self.ratios):
            raise InputError(f"the aligner part has {len(self.ratios)} ratios and the grid {steps} steps; fit it again")
        run.set_argument("aligner", "num_inference_steps", steps, known_arguments)
        guidance = run.call_arguments.get("guidance_scale", run.call_arguments.get("true_cfg_scale"))
        if self.solver not in (None, name):
            run.warnings.append(f"the aligner's ratios were fitted with {self.solver}, not with {name}; fit them again")
        if None not in (self.guidance, guidance) and self.guidance != guidance:
            run.warnings.append(
                f"the aligner's ratios were fitted at guidance {self.guidance:g}, not at {guidance:g}; fit them again"
            )
        run.hooks.append(lambda: _Aligning(self.ratios))


class _Aligning(CallHook):
    def __init__(self, ratios: tuple[float, ...]) -> None:
        self.ratios = ratios

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        if evaluation.index >= len(self.ratios):
            raise InputError(
                f"the aligner part has {len(self.ratios)} ratios and the scheduler takes more steps; fit it again"
            )
        time = evaluation.time * self.ratios[evaluation.index]
        return proceed(evaluation.at_times(torch.full((evaluation.rows,), time, dtype=torch.float64)))
