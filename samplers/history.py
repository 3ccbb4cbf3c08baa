"""Forgetting what a multistep scheduler remembers of a trajectory that was left."""

from __future__ import annotations

from typing import Any

from .errors import InputError

_SLOTS = ("model_outputs", "timestep_list")
"Lists of a fixed length, one slot for each past step, None before the first."

_FRESH: dict[str, Any] = {"derivatives": (), "last_sample": None, "last_noise": None, "lower_order_nums": 0}
"What else schedulers keep of past steps, and what it is before the first one."


def forget_history(scheduler: Any) -> None:
    """Makes the next step of a scheduler of diffusers the first-order one that a fresh scheduler takes there.

    For a state that did not come from the steps before it. The place on the grid is kept, the order is built up again
    by the steps that follow. Schedulers that keep nothing between steps stay as they are.

    Args:
        scheduler: between two steps, attached by a plan or not.

    Raises:
        InputError: for PNDM on the even grid that it makes itself, whose start-up cannot be told from its steps, and
            for a scheduler whose history is kept by the pipeline.
    """
    name = type(scheduler).__name__
    if name == "CogVideoXDPMScheduler":
        raise InputError(f"{name} has its history from the pipeline and cannot forget it; use CogVideoXDDIMScheduler")
    if name == "PNDMScheduler" and scheduler.counter:
        raise InputError(
            "PNDMScheduler on its own even grid cannot forget its history; move a point of the grid, or use "
            "DPMSolverMultistepScheduler"
        )
    if name in ("PNDMScheduler", "IPNDMScheduler"):
        scheduler.set_timesteps(scheduler.num_inference_steps, device=scheduler.timesteps.device)
        return
    for attribute in _SLOTS:
        if attribute in vars(scheduler):
            setattr(scheduler, attribute, [None] * len(getattr(scheduler, attribute)))
    for attribute, fresh in _FRESH.items():
        if attribute in vars(scheduler):
            setattr(scheduler, attribute, list(fresh) if isinstance(fresh, tuple) else fresh)
    if name == "LMSDiscreteScheduler":
        _count_derivatives(scheduler)


def _count_derivatives(scheduler: Any) -> None:
    """LMS takes its order from the place on the grid; from now on, from the derivatives that it has."""
    weight = type(scheduler).get_lms_coefficient

    def get_lms_coefficient(order: int, t: int, current_order: int) -> Any:
        return weight(scheduler, min(order, len(scheduler.derivatives)), t, current_order)

    scheduler.get_lms_coefficient = get_lms_coefficient
