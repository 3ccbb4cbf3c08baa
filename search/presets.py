"""Searches that are ready to run, and the plans that they begin with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..samplers import DiffusersSolver, EpsilonScaling, InputError, Plan, RuleGrid, SpacingGrid
from ..samplers.files import read_json, write_json
from ..samplers.part import Part
from .axes.solver import SolverAxis
from .axes.steps import prepared
from .cache import Call
from .grid_paths import suggest_grids
from .space import Axis, Space

EARLY = 0.8
"Share of the times that an early start leaves."

SCALE = 1.02
"Epsilon scaling that is tried to begin with."

FAVOURITES = ("unipc-2", "sa-solver", "euler")
"Solvers of the axis that are tried on every grid to begin with, as far as they suit the pipeline."

SUGGESTED = 4
"Grids that the teacher's trajectory suggests."

RECORDED = 32
"Samples of the teacher's trajectory."


@dataclass(frozen=True)
class Preset:
    """What a search is run with unless it is told otherwise.

    Attributes:
        space: names of axes; one that a pipeline has no use for is left out where ``optional`` says so.
        optional: axes that are left out where they cannot work.
        trials: distinct plans to measure.
        sampler: a name of `OPTUNA_SAMPLERS`; None leaves it to the number of objectives.
        suggests: whether the search begins with grids from the teacher's trajectory, and diffusers' own.
    """

    space: tuple[str, ...]
    optional: tuple[str, ...]
    trials: int
    sampler: str | None
    suggests: bool


PRESETS: dict[str, Preset] = {
    "fast": Preset(("grid", "solver", "correction", "guidance"), ("solver", "correction", "guidance"), 64, "gp", True),
    "autodiffusion": Preset(("grid-index",), (), 750, "evolution", False),
    "autodiffusion-layers": Preset(("grid-index", "layers"), (), 750, "evolution", False),
}
"""``fast`` is ours. ``autodiffusion`` is the evolution of arXiv:2309.10438 over steps alone, and with ``-layers`` over
the layers of each step too."""


def preset_space(pipe: Any, base: Plan, preset: Preset) -> Space:
    """The space of a preset on a pipeline.

    Raises:
        InputError: when an axis that is not optional cannot work.
    """
    axes: list[Axis] = []
    for name in preset.space:
        try:
            axes += Space.of(pipe, base, [name]).axes
        except InputError:
            if name not in preset.optional:
                raise
    return Space(base, tuple(axes))


@dataclass(frozen=True)
class Beginning:
    """Plans that a search begins with, and the network rows that it took to find them."""

    plans: tuple[Plan, ...]
    rows: int = 0

    def save(self, path: Path) -> None:
        """Writes a JSON file."""
        write_json(path, {"plans": [plan.to_json() for plan in self.plans], "rows": self.rows})

    @classmethod
    def load(cls, path: Path) -> Beginning:
        """Reads what `save` wrote; the plans are beside no files.

        Raises:
            InputError: when the file cannot be read, or holds something else.
        """
        data = read_json(path)
        try:
            return cls(tuple(map(Plan.from_json, data["plans"])), int(data["rows"]))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path} holds no plans to begin with; delete it, and they are found again") from None


def suggested_starts(pipe: Any, space: Space, call: Call, steps: int) -> Beginning:
    """Every grid that diffusers has and that the teacher's trajectory suggests, with every favourite solver.

    Args:
        pipe: the pipeline.
        space: of the search; its solver axis says which solvers there are.
        call: from numbers of samples to the arguments of a call for them.
        steps: of the grids.
    """
    solvers = list(_solvers(space))
    built_in = _built_in(pipe, space.base, steps)
    grids, rows = list(built_in), 0
    for solver in solvers:
        try:
            found = suggest_grids(pipe, _with(space.base, solver=solver), call, steps=steps, n=RECORDED)
        except InputError:
            continue
        grids += [path.grid for path in found.paths[:SUGGESTED]]
        rows += found.rows
        break
    plans = [_with(space.base, grid=grid, solver=solver) for grid, solver in product(grids, solvers)]
    if any(axis.name == "correction" for axis in space.axes):
        correction = EpsilonScaling(scale=SCALE)
        plans += [_with(space.base, grid=grid, solver=solvers[0], correction=correction) for grid in built_in]
    return Beginning(tuple(dict.fromkeys(plans)), rows)


def _built_in(pipe: Any, base: Plan, steps: int) -> list[Part]:
    """Grids that diffusers has, and the even one from an early start on."""
    early = EARLY * prepared(pipe, base).process.time_range.noisiest
    return [
        SpacingGrid(steps=steps, spacing="leading"),
        RuleGrid(rule="karras", steps=steps),
        RuleGrid(rule="trailing", steps=steps, options={"first": early}),
    ]


def _solvers(space: Space) -> Iterator[DiffusersSolver | None]:
    axis = next((axis for axis in space.axes if isinstance(axis, SolverAxis)), None)
    if axis is None:
        yield None
        return
    choices = dict(axis.choices)
    yield from (choices[name] for name in FAVOURITES if name in choices)


def _with(base: Plan, **parts: Part | None) -> Plan:
    """The plan with some parts, those that are None as they were."""
    return base.model_copy(update={name: part for name, part in parts.items() if part is not None})
