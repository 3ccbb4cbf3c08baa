"""Explicit grids on diffusers' schedulers: the coefficients between the given timesteps are the true ones.

Schedulers come in families, and each has one way, in a file of its own: those that step between sigmas
(`explicit_sigmas`), flow matching (`explicit_flow`), EDM (`explicit_edm`), those that look alphas up by timestep
(`explicit_table`), and the pseudo multi-step ones (`explicit_multistep`). This module is the way in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import explicit_edm, explicit_flow, explicit_multistep, explicit_sigmas, explicit_table  # noqa: F401  register
from .errors import InputError
from .explicit_base import EXPLICIT, GridAdapter
from .solver import scheduler_names

__all__ = ["EXPLICIT", "ExplicitSupport", "GridAdapter", "explicit_support", "grid_adapter"]


@dataclass(frozen=True, slots=True)
class ExplicitSupport:
    """What one scheduler of diffusers makes of an explicit grid.

    Attributes:
        scheduler: its class name.
        runs: whether it runs one.
        order: global order of convergence with its default options; None for a stochastic one, or where ``runs`` is
            False.
        reason: why it cannot, where ``runs`` is False.
        note: what to know about it, possibly empty.
    """

    scheduler: str
    runs: bool
    order: int | None
    reason: str | None
    note: str


_STOCHASTIC = "stochastic"
_TWICE = "evaluates twice per step: `timesteps` has all but the first listed twice"
_MIDDLE = "evaluates twice per step: `timesteps` has a point of its own, in the middle of log-sigma, between listed two"
_SMALLEST = "stops at the smallest noise level, timestep 0"

FACTS: dict[str, tuple[int | None, str]] = {
    "CogVideoXDDIMScheduler": (1, ""),
    "CosineDPMSolverMultistepScheduler": (None, f"{_STOCHASTIC}; times 2/pi arctan(sigma); needs torchsde"),
    "DDIMParallelScheduler": (1, "`step` only; `batch_step_no_noise` keeps diffusers' even steps"),
    "DDIMScheduler": (1, ""),
    "DDPMParallelScheduler": (None, f"{_STOCHASTIC}; `step` only; `batch_step_no_noise` keeps diffusers' even steps"),
    "DDPMScheduler": (None, f"{_STOCHASTIC}; no noise in the last step, wherever it starts"),
    "DEISMultistepScheduler": (2, _SMALLEST),
    "DPMSolverMultistepScheduler": (2, ""),
    "DPMSolverSDEScheduler": (None, f"{_STOCHASTIC}; {_MIDDLE}; needs torchsde"),
    "DPMSolverSinglestepScheduler": (
        2,
        "the listed times include the intermediate points of its steps; order 3 needs a smooth grid",
    ),
    "EDMDPMSolverMultistepScheduler": (2, "times log(sigma)/4"),
    "EDMEulerScheduler": (1, "times log(sigma)/4"),
    "EulerAncestralDiscreteScheduler": (None, _STOCHASTIC),
    "EulerDiscreteScheduler": (1, ""),
    "FlowMapEulerDiscreteScheduler": (1, ""),
    "FlowMatchEulerDiscreteScheduler": (1, ""),
    "FlowMatchHeunDiscreteScheduler": (2, _TWICE),
    "FlowMatchLCMScheduler": (None, _STOCHASTIC),
    "HeunDiscreteScheduler": (2, _TWICE),
    "IPNDMScheduler": (2, "times above 0 and at most 1"),
    "KDPM2AncestralDiscreteScheduler": (None, f"{_STOCHASTIC}; {_MIDDLE}"),
    "KDPM2DiscreteScheduler": (2, _MIDDLE),
    "LCMScheduler": (None, _STOCHASTIC),
    "LMSDiscreteScheduler": (4, "starts at order 1"),
    "LTXEulerAncestralRFScheduler": (None, _STOCHASTIC),
    "PNDMScheduler": (2, "start-up evaluations of its own: `timesteps` has the second listed twice, or Runge-Kutta's"),
    "SASolverScheduler": (None, f"{_STOCHASTIC} between timesteps 200 and 800; {_SMALLEST}"),
    "TCDScheduler": (None, f"{_STOCHASTIC} unless eta is 0; {_SMALLEST}"),
    "UniPCMultistepScheduler": (2, ""),
}
"Order and note of every scheduler that runs an explicit grid."

REASONS: dict[str, str] = {
    **dict.fromkeys(
        ("AmusedScheduler", "BlockRefinementScheduler", "EntropyBoundScheduler", "VQDiffusionScheduler"),
        "it unmasks discrete tokens, so there is no noise level to put at a listed time",
    ),
    "DiscreteDDIMScheduler": "it samples discrete tokens, so there is no noise level to put at a listed time",
    **dict.fromkeys(
        ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
        "it walks from data to noise, and an explicit grid runs from noise to data",
    ),
    "CMStochasticIterativeScheduler": "its consistency model was trained on the sigmas of its own grid and its "
    "pipeline picks among those",
    "CogVideoXDPMScheduler": "its step takes the prediction and the time before as arguments, which its pipeline "
    "keeps and no other way of driving a scheduler gives",
    "DDPMWuerstchenScheduler": "its times are ratios from 1 to 0 with the end in the list, which its pipelines cut "
    "themselves",
    "HeliosDMDScheduler": "it samples a pyramid of resolutions, each with a grid of its own",
    "HeliosScheduler": "it samples a pyramid of resolutions, each with a grid of its own",
    "KarrasVeScheduler": "its pipeline drives it by sigmas that it churns and corrects itself, not by timesteps",
    "MiniMaxH3Scheduler": "its time rises from 0 at noise to 1 at data, and an explicit grid decreases",
    "PiflowScheduler": "its network predicts a policy for the segments of the grid it was distilled on",
    "RFD4ProteinaScheduler": "it integrates two modalities of a protein with one grid each",
    "RePaintScheduler": "it jumps back to noisier times to harmonise an inpainting, and an explicit grid decreases",
    "SCMScheduler": "its times are TrigFlow angles from pi/2 to 0 with the end in the list, which its pipeline makes",
    "ScoreSdeVeScheduler": "it corrects at sigmas of its own ladder, with two kinds of step that its pipeline calls",
    "UnCLIPScheduler": "its pipelines, not the scheduler, say where a step lands",
}
"Why a scheduler cannot run an explicit grid."


def explicit_support() -> list[ExplicitSupport]:
    """What every scheduler of the installed diffusers makes of an explicit grid, by name."""
    return [_support(name) for name in scheduler_names()]


def _support(name: str) -> ExplicitSupport:
    if name in EXPLICIT:
        order, note = FACTS[name]
        return ExplicitSupport(name, True, order, None, note)
    return ExplicitSupport(name, False, None, REASONS.get(name, "fewstep does not know this scheduler"), "")


def grid_adapter(scheduler: Any, timesteps: tuple[float, ...]) -> GridAdapter:
    """The adapter that runs ``scheduler`` on an explicit grid.

    Raises:
        InputError: when this scheduler has none, or the grid does not fit it.
    """
    name = type(scheduler).__name__
    if name not in EXPLICIT:
        raise InputError(
            f"{name} does not run an explicit grid: {_support(name).reason}; use a 'spacing' grid, or one of "
            f"{', '.join(EXPLICIT.names())}"
        )
    return EXPLICIT[name](scheduler, timesteps)
