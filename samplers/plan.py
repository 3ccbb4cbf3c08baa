"""The plan: how to sample, as data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from .cache import CACHES
from .conditioning import CONDITIONINGS
from .correction import CORRECTIONS
from .errors import InputError, first_problem, unknown_name
from .files import read_json, write_json
from .grid import GRIDS
from .guidance import GUIDANCES
from .models import MODELS
from .part import Part, Slot
from .provenance import Evidence, TunedFor
from .solver import SOLVERS
from .start import STARTS
from .weights import WEIGHTS

PLAN_VERSION = 1


class Plan(BaseModel):
    """How to sample from a diffusers pipeline. A part that is left out stays as the pipeline has it.

    The parts are applied in the order of the fields. Plans are frozen; ``plan.model_copy(update=...)`` makes another.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

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

    _folder: Path | None = PrivateAttr(default=None)

    @property
    def folder(self) -> Path | None:
        """The folder of the file that the plan was loaded from, where the files that it names are."""
        return self._folder

    def file_digests(self) -> dict[str, str]:
        """sha256 of the files that the parts read, by name; those that are not there (handed over instead) left out."""
        if self.folder is None:
            return {}
        found: dict[str, str] = {}
        for name in (name for part in self.parts for name in part.files):
            path = self.folder / name
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    with file.open("rb") as stream:
                        found[str(file.relative_to(self.folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
        return found

    def __eq__(self, other: object) -> bool:
        """Whether both say the same, wherever they were loaded from."""
        return isinstance(other, Plan) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        """Equal plans have equal hashes."""
        return hash(json.dumps(self.to_json(), sort_keys=True))

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

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data, without the fields that are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True) | {"fewstep_plan": self.version}

    @classmethod
    def from_json(cls, data: Any, source: str = "plan") -> Plan:
        """The plan in JSON data.

        Args:
            data: what ``to_json`` gives.
            source: what error messages call it.

        Raises:
            InputError: one line that names the field, the value and the mend.
        """
        if not isinstance(data, dict) or "fewstep_plan" not in data:
            raise InputError(
                f'{source} is not a fewstep plan; a plan is a JSON object with "fewstep_plan": {PLAN_VERSION}'
            )
        if data["fewstep_plan"] != PLAN_VERSION:
            raise InputError(
                f"{source} has plan version {data['fewstep_plan']!r}; this fewstep reads version {PLAN_VERSION}"
            )
        known = {info.alias or name for name, info in cls.model_fields.items()}
        for key in data:
            if key not in known:
                raise InputError(f"{source}: {unknown_name('part', str(key), known)}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(f"{source}: {first_problem(error)}") from None
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan from a JSON file.

        Raises:
            InputError: when the file is missing, not JSON, or not a valid plan.
        """
        plan = cls.from_json(read_json(Path(path)), str(path))
        plan._folder = Path(path).resolve().parent
        return plan

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON; the file is complete or absent."""
        write_json(Path(path), self.to_json())
