"""The plan: how to sample, as data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .cache import CACHES
from .conditioning import CONDITIONINGS
from .correction import CORRECTIONS
from .document import Document
from .grid import GRIDS
from .guidance import GUIDANCES
from .models import MODELS
from .part import Part, Slot
from .provenance import Evidence, TunedFor
from .solver import SOLVERS
from .start import STARTS
from .weights import WEIGHTS


class Plan(Document):
    """How to sample from a diffusers pipeline. A part that is left out stays as the pipeline has it.

    The parts are applied in the order of the fields. Plans are frozen; ``plan.model_copy(update=...)`` makes another.
    """

    noun = "plan"

    version: Literal[1] = Field(default=1, alias="fewstep_plan", description="Version of this format.")
    name: str | None = Field(default=None, min_length=1, max_length=100, description="What reports call it.")
    weights: Annotated[tuple[Part, ...], Slot(WEIGHTS, many=True)] = Field(
        default=(), description="What is added to the network's weights, or runs instead of it."
    )
    solver: Annotated[Part | None, Slot(SOLVERS)] = Field(default=None, description="Which scheduler steps.")
    grid: Annotated[Part | None, Slot(GRIDS)] = Field(default=None, description="At which timesteps.")
    start: Annotated[Part | None, Slot(STARTS)] = Field(default=None, description="What sampling starts from.")
    guidance: Annotated[Part | None, Slot(GUIDANCES)] = Field(default=None, description="How strongly guided.")
    conditioning: Annotated[Part | None, Slot(CONDITIONINGS)] = Field(
        default=None, description="The time that the network is told, if not the grid's."
    )
    correction: Annotated[Part | None, Slot(CORRECTIONS)] = Field(
        default=None, description="What is done to the network's output."
    )
    models: Annotated[Part | None, Slot(MODELS)] = Field(default=None, description="Which network runs which steps.")
    caches: Annotated[tuple[Part, ...], Slot(CACHES, many=True)] = Field(
        default=(), description="What is not computed again, step by step."
    )
    tuned_for: TunedFor | None = Field(default=None, description="What it was made on.")
    evidence: tuple[Evidence, ...] = Field(default=(), description="What was measured.")

    @property
    def file_names(self) -> tuple[str, ...]:
        """Files and folders beside the plan that its parts read."""
        return tuple(name for part in self.parts for name in part.files)

    @property
    def placed(self) -> tuple[tuple[str, Part], ...]:
        """The parts that are there, in the order in which they are applied, each with the field that it is in."""
        values = ((name, getattr(self, name)) for name in type(self).model_fields)
        lists = ((name, value if isinstance(value, tuple) else (value,)) for name, value in values)
        return tuple((name, part) for name, parts in lists for part in parts if isinstance(part, Part))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that are there, in the order in which they are applied."""
        return tuple(part for _, part in self.placed)

    @property
    def nominal_steps(self) -> int | None:
        """Number of grid points, or None when the plan leaves the grid to the pipeline."""
        return getattr(self.grid, "nominal_steps", None)
