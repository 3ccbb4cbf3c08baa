"""The grid: the timesteps at which the network is evaluated."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Literal

from pydantic import Field, field_validator

from .errors import InputError
from .part import Part, Run
from .registry import Registry
from .solver import make_scheduler

GRIDS: Registry[type[Part]] = Registry("grid type")


@GRIDS.register("spacing")
class SpacingGrid(Part):
    """The scheduler's own rule for a number of steps (arXiv:2305.08891, Table 2)."""

    type: Literal["spacing"] = "spacing"
    steps: int = Field(ge=1, description="Number of steps, given to the pipeline as num_inference_steps.")
    spacing: Literal["leading", "linspace", "trailing"] | None = Field(
        default=None, description="The scheduler's timestep_spacing; null keeps the scheduler's own."
    )

    @property
    def nominal_steps(self) -> int:
        """Number of grid points."""
        return self.steps

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Sets the spacing in the scheduler and the number of steps in the call.

        Raises:
            InputError: when the scheduler has no spacing, or the pipeline no number of steps.
        """
        if self.spacing is not None:
            cls = type(run.scheduler)
            if "timestep_spacing" not in inspect.signature(cls.__init__).parameters:
                raise InputError(f"{cls.__name__} has no timestep_spacing; leave 'spacing' out of the grid part")
            run.scheduler = make_scheduler(cls, run.scheduler, {"timestep_spacing": self.spacing})
        run.set_argument("grid", "num_inference_steps", self.steps, known_arguments)


@GRIDS.register("explicit")
class ExplicitGrid(Part):
    """A list of timesteps, fractional ones too, in the network's units (0 to 999 where it was trained on 1000).

    The grid overrides whatever the pipeline hands to ``set_timesteps``, flow shifts included: what is listed
    is what the network is told, and the solver's coefficients are the true ones between the listed points.
    """

    type: Literal["explicit"] = "explicit"
    timesteps: tuple[float, ...] = Field(min_length=1, description="Strictly decreasing.")

    @field_validator("timesteps")
    @classmethod
    def _decreasing(cls, timesteps: tuple[float, ...]) -> tuple[float, ...]:
        for index, (before, after) in enumerate(pairwise(timesteps), start=1):
            if after == before:
                raise ValueError(f"timesteps must not repeat; got {after:g} twice, at index {index - 1} and {index}")
            if after > before:
                raise ValueError(f"timesteps must decrease; got {before:g} before {after:g} at index {index}")
        return timesteps

    @property
    def nominal_steps(self) -> int:
        """Number of grid points."""
        return len(self.timesteps)

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Hands the list to the run, and its length to the call.

        Raises:
            InputError: when the pipeline takes no number of steps. (The scheduler judges the list when it is wrapped.)
        """
        run.timesteps = self.timesteps
        run.set_argument("grid", "num_inference_steps", len(self.timesteps), known_arguments)
