"""The process of a pipeline at the size at which it is called."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from ..samplers import Process
from ..samplers.errors import InputError


class _Told(Exception):
    """The pipeline has told its scheduler the size."""


def process_of_call(pipe: Any, call_kwargs: Mapping[str, Any]) -> Process:
    """The forward process of a pipeline; where its scheduler shifts times by resolution, with the shift of a call.

    The call stops before the network runs.

    Args:
        pipe: a diffusers pipeline without a plan.
        call_kwargs: arguments of its call.

    Raises:
        InputError: as `Process.from_scheduler`, and when the pipeline does not tell its scheduler the shift.
    """
    process = Process.from_scheduler(pipe.scheduler)
    if getattr(process.schedule, "shift", 1.0) is not None:
        return process
    found: list[float] = []
    own = pipe.scheduler.set_timesteps

    @functools.wraps(own)
    def told(*arguments: Any, mu: float | None = None, **more: Any) -> None:
        if mu is not None:
            found.append(float(mu))
        raise _Told

    pipe.scheduler.set_timesteps = told
    try:
        with torch.no_grad():
            pipe(**call_kwargs)
    except _Told:
        pipe.maybe_free_model_hooks()
    finally:
        del pipe.scheduler.set_timesteps
    if not found:
        raise InputError(
            f"{type(pipe).__name__} does not tell its scheduler by how much to shift times; load it with a scheduler "
            "of use_dynamic_shifting=False and a shift"
        )
    return process.with_mu(found[0])
