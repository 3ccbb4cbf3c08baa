"""The solver: which scheduler takes the steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import diffusers
from diffusers import SchedulerMixin
from pydantic import Field

from .errors import InputError, unknown_name
from .part import Part, Run
from .recognise import own_option
from .registry import Registry

SOLVERS: Registry[type[Part]] = Registry("solver type")


PROCESS_OPTIONS = frozenset(
    ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
)
"""Options that are about the network and not about the sampling. Diffusers' ``from_config`` gives what nobody has set
the default of the new class, and theirs differ: DDIM's betas are linear, LCM's are not."""


def scheduler_names() -> list[str]:
    """Names of the schedulers of the installed diffusers that run in plain PyTorch."""
    return sorted(
        name
        for name in dir(diffusers)
        if name.endswith("Scheduler") and not name.startswith("Flax") and "lass" not in name
    )


def scheduler_class(name: str) -> type[SchedulerMixin]:
    """The scheduler class of diffusers called ``name``.

    Raises:
        InputError: when there is none, with the nearest name.
    """
    if name not in scheduler_names():
        raise unknown_name("scheduler", name, scheduler_names())
    found = getattr(diffusers, name)
    if not (inspect.isclass(found) and issubclass(found, SchedulerMixin)):
        raise InputError(f"{name} is not installed or not a scheduler; known: {', '.join(scheduler_names())}")
    return found


@SOLVERS.register("diffusers")
class DiffusersSolver(Part):
    """A scheduler of diffusers, made by its own ``from_config`` from the pipeline's scheduler."""

    type: Literal["diffusers"] = "diffusers"
    scheduler: str = Field(description="Class name in diffusers, such as DPMSolverMultistepScheduler.")
    config: dict[str, bool | int | float | str | list[float] | None] = Field(
        default_factory=dict, description="Options that differ from the pipeline's own scheduler."
    )

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Replaces the run's scheduler.

        ``config`` may also name numbers that the scheduler's step takes, such as ``eta``; they hold in place of what
        the pipeline's call says.

        Raises:
            InputError: for an unknown scheduler or option, or options that it refuses.
        """
        cls = scheduler_class(self.scheduler)
        options = set(inspect.signature(cls.__init__).parameters) - {"self"}
        of_step = step_options(cls) - options
        for option in self.config:
            if option not in options | of_step:
                raise unknown_name(f"option of {self.scheduler}", option, options | of_step)
        made = {name: value for name, value in self.config.items() if name in options}
        run.scheduler = make_scheduler(cls, run.scheduler, made)
        if stepped := {name: value for name, value in self.config.items() if name in of_step}:
            fix_step(run.scheduler, stepped)
            for name in known_arguments & stepped.keys():
                run.set_argument("solver", name, stepped[name], known_arguments)


def step_options(cls: type[SchedulerMixin]) -> set[str]:
    """The numbers and switches that a scheduler's step takes beside tensors, such as ``eta`` or ``s_churn``."""
    step: Any = getattr(cls, "step", None)
    known = inspect.signature(step).parameters.values() if step is not None else ()
    return {each.name for each in known if isinstance(each.default, int | float)} - {"return_dict"}


def fix_step(scheduler: Any, options: Mapping[str, Any]) -> None:
    """Gives a scheduler a subclass, in place, whose step has some of its options fixed, and takes them no more."""
    base: Any = type(scheduler)
    signature = inspect.signature(base.step)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.step(self, *args, **kwargs, **options)

    kept = [each for name, each in signature.parameters.items() if name not in options]
    step.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    body = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, "step": step}
    scheduler.__class__ = type(base.__name__, (base,), body)


def make_scheduler(cls: type[SchedulerMixin], like: SchedulerMixin, options: dict[str, Any]) -> SchedulerMixin:
    """``cls.from_config`` of another scheduler's configuration, with ``options`` on top.

    Raises:
        InputError: when the scheduler refuses them, or they contradict each other.
    """
    config = dict(like.config)
    unset = set(config.get("_use_default_values", ())) - PROCESS_OPTIONS
    try:
        scheduler = cls.from_config(config | {"_use_default_values": list(unset)}, **options)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"{cls.__name__} refuses this configuration: {error}") from error
    if own_option(scheduler, "rescale_betas_zero_snr") and scheduler.config.get("prediction_type") == "epsilon":
        raise InputError(
            "epsilon prediction is undefined at zero terminal SNR, where x is epsilon itself (arXiv:2305.08891, "
            "Section 3.2); leave rescale_betas_zero_snr out, or use a network that predicts v or the sample"
        )
    return scheduler
