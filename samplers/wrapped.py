"""A scheduler of diffusers, wrapped so that a plan's grid runs and any pipeline can drive it.

The wrapper is a subclass made for one attachment. Three things are added to diffusers' class:

* ``set_timesteps`` puts the plan's explicit grid in place, whatever the pipeline asks for.
* Some pipelines (``DiTPipeline``, ``DDIMPipeline``, ``DDPMPipeline``) start from plain unit noise and never ask for
  ``init_noise_sigma``; Euler's family, which keeps x/alpha, then samples noise. The wrapper notices that the
  pipeline did not ask, and converts between the network's x and the scheduler's around each step.
* ``step`` leaves out neutral arguments that a pipeline passes for its own scheduler (``eta=0.0``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .explicit import GridAdapter


class SchedulerState:
    """What the wrapper knows about its scheduler.

    Attributes:
        grid: the explicit grid, or None.
        on_step: called with the timestep after each step.
        native: whether the pipeline itself brings samples into the scheduler's state space.
    """

    def __init__(self, scheduler: Any, grid: GridAdapter | None, on_step: Callable[[Any], None]) -> None:
        self.grid = grid
        self.on_step = on_step
        self.scales = hasattr(scheduler, "scale_model_input") and hasattr(scheduler, "init_noise_sigma")
        self.native = False
        self.step_options = frozenset(inspect.signature(scheduler.step).parameters)

    def reset(self) -> None:
        """Forgets what the last call of the pipeline did."""
        self.native = False


def wrap_scheduler(scheduler: Any, grid: GridAdapter | None, on_step: Callable[[Any], None]) -> SchedulerState:
    """Gives ``scheduler`` its wrapping subclass, in place, and returns the wrapper's state."""
    base = type(scheduler)
    state = SchedulerState(scheduler, grid, on_step)
    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    body["set_timesteps"] = _wrapped_set_timesteps(base, state)
    body["step"] = _wrapped_step(base, state)
    if hasattr(base, "add_noise"):
        body["add_noise"] = _wrapped_add_noise(base, state)
    if state.scales:
        body["scale_model_input"] = _wrapped_scale_model_input(base, state)
        body["init_noise_sigma"] = _wrapped_init_noise_sigma(base, state)
    scheduler.__class__ = type(base.__name__, (base,), body)
    return state


def _wrapped_set_timesteps(base: Any, state: SchedulerState) -> Callable[..., None]:
    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        original = functools.partial(base.set_timesteps, self)
        if state.grid is None:
            original(*args, **kwargs)
        else:
            bound = inspect.signature(base.set_timesteps).bind_partial(self, *args, **kwargs)
            state.grid.set_timesteps(original, bound.arguments.get("device"))

    return set_timesteps


def _wrapped_add_noise(base: Any, state: SchedulerState) -> Callable[..., Tensor]:
    @functools.wraps(base.add_noise)
    def add_noise(self: Any, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        state.native = True
        original: Callable[..., Tensor] = functools.partial(base.add_noise, self)
        if state.grid is None:
            return original(original_samples, noise, timesteps)
        return state.grid.add_noise(original, original_samples, noise, timesteps)

    return add_noise


def _wrapped_scale_model_input(base: Any, state: SchedulerState) -> Callable[..., Tensor]:
    @functools.wraps(base.scale_model_input)
    def scale_model_input(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scaled: Tensor = base.scale_model_input(self, sample, *args, **kwargs)
        return scaled if state.native else sample

    return scale_model_input


def _wrapped_init_noise_sigma(base: Any, state: SchedulerState) -> property:
    inherited = getattr(base, "init_noise_sigma", None)

    def read(self: Any) -> Any:
        state.native = True
        if isinstance(inherited, property):
            return inherited.__get__(self)
        return self.__dict__["init_noise_sigma"]

    def write(self: Any, value: Any) -> None:
        self.__dict__["init_noise_sigma"] = value

    return property(read, write)


def _wrapped_step(base: Any, state: SchedulerState) -> Callable[..., Any]:
    @functools.wraps(base.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(base.step).bind_partial(self, model_output, timestep, sample, *args)
        options = dict(list(bound.arguments.items())[4:]) | _accepted(kwargs, state.step_options, base.__name__)
        convert = state.scales and not state.native
        if convert:
            sample = sample / _network_scale(self, base, sample, timestep)
        original = functools.partial(base.step, self)
        if state.grid is None:
            result = original(model_output, timestep, sample, **options)
        else:
            result = state.grid.step(original, model_output, timestep, sample, options)
        if convert:
            result = _rescaled(result, _network_scale(self, base, sample, timestep))
        state.on_step(timestep)
        return result

    return step


def _accepted(kwargs: dict[str, Any], known: frozenset[str], name: str) -> dict[str, Any]:
    """``kwargs`` without arguments that the scheduler does not take, where that changes nothing.

    A scheduler that takes no generator draws no noise.
    """
    for key, value in kwargs.items():
        if key not in known and key != "generator" and value not in (None, False, 0, 0.0):
            raise InputError(f"{name} takes no {key}={value!r} from the pipeline's call; leave {key} at its default")
    return {key: value for key, value in kwargs.items() if key in known}


def _network_scale(scheduler: Any, base: Any, sample: Tensor, timestep: Any) -> Tensor:
    """What the scheduler's state is multiplied with, where the scheduler stands, to give the network's x."""
    one = torch.ones(1, dtype=torch.float32, device=sample.device)
    scale: Tensor = base.scale_model_input(scheduler, one, timestep)
    return scale.to(sample.dtype)


def _rescaled(result: Any, scale: Tensor) -> Any:
    """A step's result with its sample brought back to the network's x."""
    if isinstance(result, tuple):
        return (result[0] * scale, *result[1:])
    result.prev_sample = result.prev_sample * scale
    return result
