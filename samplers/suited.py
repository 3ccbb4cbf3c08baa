"""Whether a plan's solver samples the process that the pipeline's network was trained for."""

from __future__ import annotations

from typing import Any

from .errors import InputError
from .recognise import own_option, recognise
from .schedules import EDMSchedule, FlowSchedule, InvertedFlowSchedule, NoiseSchedule

VARIANCE_PRESERVING, FLOW = "a variance preserving process", "flow matching"
INVERTED, EDM = "flow matching with its time towards data", "an EDM process"

SUCH_AS = {
    VARIANCE_PRESERVING: "DDIMScheduler",
    FLOW: "FlowMatchEulerDiscreteScheduler",
    INVERTED: "FlowMatchEulerDiscreteScheduler",
    EDM: "EDMEulerScheduler",
}
"A solver of each process."

FLOW_OPTIONS = "use_flow_sigmas=true and prediction_type='flow_prediction'"


def check_solver(own: Any, solver: Any) -> None:
    """Looks for a solver of another process than the pipeline's own scheduler.

    What else tells processes apart, such as betas or zero terminal SNR, a plan may change; schedulers that are not
    known pass.

    Args:
        own: the pipeline's scheduler.
        solver: the plan's.

    Raises:
        InputError: when the kinds of process differ, or a solver of flow matching takes the network's output for
            something else.
    """
    wanted, got = _process(own), _process(solver)
    if wanted is None or got is None or wanted == got:
        return
    name, (kind, prediction) = type(solver).__name__, wanted
    samples = f"{name} samples {got[0]}" if got[0] != kind else f"{name} takes the output for {got[1]}"
    if kind == FLOW and own_option(solver, "use_flow_sigmas") is not None:
        mend = f"set {FLOW_OPTIONS} in the solver's config"
    else:
        mend = f"use a solver of that, such as {SUCH_AS[kind]}"
    trained = kind if got[0] != kind else f"{kind} with {prediction}"
    raise InputError(f"{samples}, and the pipeline's {type(own).__name__} {trained}; {mend}")


def _process(scheduler: Any) -> tuple[str, str] | None:
    """The kind of process, and of flow matching the prediction type; None when the scheduler is not known."""
    try:
        schedule, prediction, _ = recognise(scheduler)
    except InputError:
        flow = own_option(scheduler, "prediction_type") == "flow_prediction"
        return (VARIANCE_PRESERVING, "") if flow else None
    kind = _kind(schedule)
    return kind, prediction.name if isinstance(schedule, FlowSchedule) else ""


def _kind(schedule: NoiseSchedule) -> str:
    if isinstance(schedule, InvertedFlowSchedule):
        return INVERTED
    if isinstance(schedule, FlowSchedule):
        return FLOW
    return EDM if isinstance(schedule, EDMSchedule) else VARIANCE_PRESERVING
