"""From a diffusers scheduler to its noise schedule and prediction type."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from .errors import InputError
from .prediction import EDM, PREDICTIONS, EDMVelocity, Flow, InvertedFlow, Prediction, Velocity
from .schedules import (
    ArctanEDMSchedule,
    EDMSchedule,
    FlowSchedule,
    InvertedFlowSchedule,
    NoiseSchedule,
    TableSchedule,
    TrigSchedule,
)


class Recognised(NamedTuple):
    """What a scheduler says about its process."""

    schedule: NoiseSchedule
    prediction: Prediction
    state_over_alpha: bool = False


def own_option(scheduler: Any, name: str, default: Any = None) -> Any:
    """The value of an option that a scheduler's class takes.

    ``from_config`` of another scheduler keeps options in the config that the class knows nothing of.

    Args:
        scheduler: of diffusers, or of a subclass.
        name: the option.
        default: what it is where the class does not take it.
    """
    kind: Any = type(scheduler)
    return scheduler.config.get(name, default) if name in _options(kind) else default


@functools.lru_cache(maxsize=256)
def _options(kind: Any) -> frozenset[str]:
    """What the constructors of a class and its bases take."""
    return frozenset(name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters)


def recognise(scheduler: Any) -> Recognised:
    """Schedule and prediction of a diffusers scheduler, or of a subclass of one.

    Raises:
        InputError: when the scheduler is not known, or its config contradicts itself.
    """
    for kind in type(scheduler).__mro__:
        if kind.__name__ in _READERS:
            return _READERS[kind.__name__](scheduler)
    raise InputError(
        f"unknown scheduler {type(scheduler).__name__}; give pipe.scheduler if that is one of diffusers' "
        "variance-preserving, flow-matching or EDM schedulers, or build Process(schedule, prediction) by hand"
    )


def _vp(scheduler: Any) -> Recognised:
    """Table of ``alphas_cumprod``, and the flow variant that several of these schedulers have by config."""
    prediction = PREDICTIONS[own_option(scheduler, "prediction_type", "epsilon")]
    if own_option(scheduler, "use_flow_sigmas"):
        if isinstance(prediction, Velocity):
            raise InputError(
                "use_flow_sigmas=True with prediction_type='v_prediction' mixes two processes; "
                "set prediction_type='flow_prediction'"
            )
        return Recognised(_flow_schedule(scheduler, FlowSchedule, own_option(scheduler, "flow_shift", 1.0)), prediction)
    if isinstance(prediction, Flow):
        raise InputError("prediction_type='flow_prediction' needs use_flow_sigmas=True in the scheduler's config")
    return Recognised(_table(scheduler), prediction)


def _k_diffusion(scheduler: Any) -> Recognised:
    """Schedulers that keep x / alpha, whose noise level is sigma / alpha."""
    return Recognised(_table(scheduler), PREDICTIONS[scheduler.config.prediction_type], state_over_alpha=True)


def _euler(scheduler: Any) -> Recognised:
    """As the others of its family, but for the EDM network of Stable Video Diffusion (sigma_data = 1)."""
    config = scheduler.config
    if config.timestep_type == "continuous" and config.prediction_type == "v_prediction":
        table = _table(scheduler).alphas_cumprod
        return Recognised(
            EDMSchedule(
                sigma_min=config.sigma_min or math.sqrt((1 - table[0]) / table[0]),
                sigma_max=config.sigma_max or math.sqrt((1 - table[-1]) / table[-1]),
                sigma_data=1.0,
                rho=math.inf if config.use_exponential_sigmas else 7.0,
            ),
            EDMVelocity(1.0),
        )
    return _k_diffusion(scheduler)


def _flow(scheduler: Any) -> Recognised:
    """Flow matching."""
    shift = getattr(scheduler, "_shift", own_option(scheduler, "shift", 1.0))  # what set_shift changes
    if own_option(scheduler, "invert_sigmas"):
        return Recognised(_flow_schedule(scheduler, InvertedFlowSchedule, shift), InvertedFlow())
    return Recognised(_flow_schedule(scheduler, FlowSchedule, shift), Flow())


def _edm(scheduler: Any) -> Recognised:
    """EDM with log time."""
    return _preconditioned(scheduler, EDMSchedule)


def _arctan_edm(scheduler: Any) -> Recognised:
    """EDM with arctan time."""
    return _preconditioned(scheduler, ArctanEDMSchedule)


def _ipndm(scheduler: Any) -> Recognised:
    """IPNDM has neither a table nor a prediction type: its step says quarter circle and v-prediction."""
    return Recognised(TrigSchedule(), Velocity())


def _preconditioned(scheduler: Any, kind: type[EDMSchedule]) -> Recognised:
    config = scheduler.config
    predictions: dict[str, type[EDM]] = {"epsilon": EDM, "v_prediction": EDMVelocity}
    if config.prediction_type not in predictions:
        raise InputError(
            f"{type(scheduler).__name__} cannot precondition prediction_type={config.prediction_type!r}; "
            "set 'epsilon' or 'v_prediction'"
        )
    rho = math.inf if config.sigma_schedule == "exponential" else own_option(scheduler, "rho", 7.0)
    schedule = kind(config.sigma_min, config.sigma_max, config.sigma_data, rho)
    return Recognised(schedule, predictions[config.prediction_type](config.sigma_data))


def _table(scheduler: Any) -> TableSchedule:
    # The scheduler's own rounded table, not one recomputed from the betas: it is what samples and trains.
    return TableSchedule(tuple(scheduler.alphas_cumprod.double().tolist()))


def _flow_schedule(scheduler: Any, kind: type[FlowSchedule], shift: float) -> FlowSchedule:
    rule = float if own_option(scheduler, "time_shift_type") == "linear" else math.exp
    dynamic = own_option(scheduler, "use_dynamic_shifting")
    return kind(scheduler.config.num_train_timesteps, None if dynamic else shift, rule)


_READERS: dict[str, Callable[[Any], Recognised]] = {
    **dict.fromkeys(
        (
            "CogVideoXDDIMScheduler",
            "CogVideoXDPMScheduler",
            "DDIMInverseScheduler",
            "DDIMParallelScheduler",
            "DDIMScheduler",
            "DDPMParallelScheduler",
            "DDPMScheduler",
            "DEISMultistepScheduler",
            "DPMSolverMultistepInverseScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "LCMScheduler",
            "PNDMScheduler",
            "SASolverScheduler",
            "TCDScheduler",
            "UnCLIPScheduler",
            "UniPCMultistepScheduler",
        ),
        _vp,
    ),
    **dict.fromkeys(
        (
            "DPMSolverSDEScheduler",
            "EulerAncestralDiscreteScheduler",
            "HeunDiscreteScheduler",
            "KDPM2AncestralDiscreteScheduler",
            "KDPM2DiscreteScheduler",
            "LMSDiscreteScheduler",
        ),
        _k_diffusion,
    ),
    "EulerDiscreteScheduler": _euler,
    **dict.fromkeys(
        (
            "FlowMapEulerDiscreteScheduler",
            "FlowMatchEulerDiscreteScheduler",
            "FlowMatchHeunDiscreteScheduler",
            "FlowMatchLCMScheduler",
            "LTXEulerAncestralRFScheduler",
        ),
        _flow,
    ),
    "EDMDPMSolverMultistepScheduler": _edm,
    "EDMEulerScheduler": _edm,
    "CosineDPMSolverMultistepScheduler": _arctan_edm,
    "IPNDMScheduler": _ipndm,
}
