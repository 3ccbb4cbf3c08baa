"""A scheduler of diffusers, wrapped so that a plan's grid runs and any pipeline can drive it.

The wrapper is a subclass made for one attachment. These things are added to diffusers' class:

* ``set_timesteps`` puts the plan's explicit grid in place, whatever the pipeline asks for: also one that hands over
  sigmas of its own (Flux, Qwen-Image) to a scheduler that takes none. On a plan's spacing such a scheduler goes by
  their number.
* Some pipelines (``DiTPipeline``, ``DDIMPipeline``, ``DDPMPipeline``) start from plain unit noise and never ask for
  ``init_noise_sigma``; Euler's family, which keeps x/alpha, then samples noise. The wrapper notices that the
  pipeline did not ask, and converts between the network's x and the scheduler's around each step.
* ``step`` leaves out neutral arguments that a pipeline passes for its own scheduler (``eta=0.0``), draws noise from the
  call's generator where the pipeline hands it none (``DiTPipeline``), and shows the step to the running call, whose
  hooks may change it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .call import Call, Step
from .errors import InputError
from .explicit import GridAdapter
from .process import Process


class SchedulerState:
    """What the wrapper knows about its scheduler.

    Attributes:
        grid: the explicit grid that runs, or None.
        call: the call of the pipeline that runs, or None.
        by_number: whether the plan says how many steps there are, and sigmas of the pipeline's own no more than that.
        native: whether the pipeline itself brings samples into the scheduler's state space.
    """

    def __init__(self, scheduler: Any, grid: GridAdapter | None, by_number: bool) -> None:
        self.grid = self._plan_grid = grid
        self.by_number = by_number
        self.call: Call | None = None
        self.scales = hasattr(scheduler, "scale_model_input") and hasattr(scheduler, "init_noise_sigma")
        self.native = False
        self.step_options = frozenset(inspect.signature(scheduler.step).parameters)

    def begin(self, call: Call | None, grid: GridAdapter | None = None) -> None:
        """Forgets what the last call of the pipeline did; ``call`` runs now, on ``grid`` if it is not the plan's."""
        self.call = call
        self.grid = grid or self._plan_grid
        self.native = False


def wrap_scheduler(scheduler: Any, grid: GridAdapter | None = None, by_number: bool = False) -> SchedulerState:
    """Gives ``scheduler`` its wrapping subclass, in place.

    Args:
        scheduler: the scheduler.
        grid: the explicit grid that it runs, or None.
        by_number: whether sigmas that it does not take stand for their number, where it runs a grid of its own.

    Returns:
        The wrapper's state.

    Raises:
        InputError: when its step takes the time at another place than other schedulers do (CogVideoX's DPM).
    """
    base: Any = type(scheduler)
    arguments = list(inspect.signature(base.step).parameters)
    if "timestep" in arguments and arguments.index("timestep") != 2:
        raise InputError(
            f"{base.__name__} takes ({', '.join(arguments[1:])}) in its step, which no plan can follow; give the plan "
            "another solver"
        )
    state = SchedulerState(scheduler, grid, by_number)
    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    body["set_timesteps"] = _SetTimesteps(base, state)
    body["step"] = _wrapped_step(base, state)
    if hasattr(base, "add_noise"):
        body["add_noise"] = _wrapped_add_noise(base, state)
    if state.scales:
        body["scale_model_input"] = _wrapped_scale_model_input(base, state)
        body["init_noise_sigma"] = _wrapped_init_noise_sigma(base, state)
    scheduler.__class__ = type(base.__name__, (base,), body)
    return state


class _SetTimesteps:
    """The method ``set_timesteps``; pipelines look at its signature before they hand over a list."""

    def __init__(self, base: Any, state: SchedulerState) -> None:
        self.base, self.state = base, state
        self.known = inspect.signature(base.set_timesteps).parameters

    def __get__(self, scheduler: Any, owner: Any = None) -> Callable[..., None]:
        if scheduler is None:
            return cast(Callable[..., None], self.base.set_timesteps)
        original: Callable[..., None] = functools.partial(self.base.set_timesteps, scheduler)
        if self.state.grid is not None:
            return functools.partial(self._listed, self.state.grid, original)
        if self.state.by_number and "sigmas" not in self.known:
            return functools.partial(self._counted, original)
        return original

    def _listed(
        self,
        grid: GridAdapter,
        original: Callable[..., None],
        num_inference_steps: Any = None,
        device: Any = None,
        *others: Any,
        sigmas: Any = None,
        timesteps: Any = None,
        **options: Any,
    ) -> None:
        grid.set_timesteps(original, device)

    def _counted(self, original: Callable[..., None], *args: Any, sigmas: Any = None, **options: Any) -> None:
        if sigmas is None:
            original(*args, **options)
        else:
            original(len(sigmas), **{name: value for name, value in options.items() if name in self.known})


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
        if state.call is not None:
            state.call.position(*args, **kwargs)
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
    signature = inspect.signature(base.step)

    @functools.wraps(base.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(self, model_output, timestep, sample, *args)
        options = dict(list(bound.arguments.items())[4:]) | _accepted(kwargs, state.step_options, base.__name__)
        call = state.call
        if call is not None and "generator" in state.step_options and options.get("generator") is None:
            options["generator"] = call.generator_of(len(sample))
        if call is None or not call.hooks:
            result = _converted_step(self, base, state, model_output, timestep, sample, options)
        else:
            result = _shown_step(self, base, state, call, model_output, timestep, sample, options)
        if call is not None:
            call.close_step(timestep)
        return result

    return step


def _converted_step(
    scheduler: Any,
    base: Any,
    state: SchedulerState,
    output: Tensor,
    timestep: Any,
    sample: Tensor,
    options: dict[str, Any],
) -> Any:
    """The scheduler's step, from and to the state space of the pipeline."""
    convert = state.scales and not state.native
    if convert:
        sample = sample / _network_scale(scheduler, base, sample, timestep)
    original = functools.partial(base.step, scheduler)
    if state.grid is None:
        result = original(output, timestep, sample, **options)
    else:
        result = state.grid.step(original, output, timestep, sample, options)
    return _scaled(result, _network_scale(scheduler, base, sample, timestep)) if convert else result


def _shown_step(
    scheduler: Any,
    base: Any,
    state: SchedulerState,
    call: Call,
    output: Tensor,
    timestep: Any,
    sample: Tensor,
    options: dict[str, Any],
) -> Any:
    """The scheduler's step, shown to the hooks before and after in terms of x = alpha x0 + sigma eps."""
    process = call.process
    assert process is not None
    index, times = call.position(timestep), scheduler.timesteps
    time = float(timestep)
    next_time = float(times[index + 1]) if index + 1 < len(times) else process.clean_time
    scale, next_scale = (_pipeline_scale(process, state, at) for at in (time, next_time))
    x = sample / scale if scale != 1 else sample
    step = Step(index, time, next_time, process, scheduler, output, x)
    call.begin_step(step)
    if step.x is not x:
        sample = step.x * scale
    result = _converted_step(scheduler, base, state, step.output, timestep, sample, options)
    landed = result[0] if isinstance(result, tuple) else result.prev_sample
    x_next = step.x_next = landed / next_scale if next_scale != 1 else landed
    call.end_step(step)
    if step.x_next is not x_next:
        landed = (step.x_next * next_scale).to(landed.dtype)
        if isinstance(result, tuple):
            return (landed, *result[1:])
        result.prev_sample = landed
    return result


def _pipeline_scale(process: Process, state: SchedulerState, time: float) -> float:
    """What x_t is multiplied with to be the pipeline's sample."""
    if state.scales and not state.native:
        return float(process.input_scale(time))
    return float(process.scheduler_state_scale(time))


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


def _scaled(result: Any, scale: Tensor) -> Any:
    """A step's result with its sample multiplied."""
    if isinstance(result, tuple):
        return (result[0] * scale, *result[1:])
    result.prev_sample = result.prev_sample * scale
    return result
