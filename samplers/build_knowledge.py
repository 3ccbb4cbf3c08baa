"""Building a knowledge base for a plan with a ReDi part."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .call import CallHook, Step
from .errors import InputError
from .fingerprint import fingerprint
from .grid import ExplicitGrid
from .knowledge import HEADER_BYTES, KnowledgeBase, class_labels, same_time
from .network import Evaluation, denoisers
from .part import Run
from .plan import Plan
from .recording import record
from .redi import ReDi


def build_knowledge_base(
    pipe: Any, plan: Plan, calls: Iterable[Mapping[str, Any]], *, detail_steps: int = 4
) -> KnowledgeBase:
    """Samples trajectories and keeps their key step: what the plan's ReDi part will look up.

    A trajectory runs the plan's own steps up to the key step, then ``detail_steps`` even ones in time where the plan
    takes one, and one evaluation at the value time.

    Args:
        pipe: a diffusers pipeline without a plan.
        plan: the plan that the base is for, its start a ReDi part, its grid a list or a rule, its solver of one
            evaluation a step.
        calls: arguments of the pipeline's calls, with other seeds than those that will be sampled. Calls beyond the
            part's ``max_bytes`` are not run.
        detail_steps: at least 1.

    Raises:
        InputError: when the plan has no ReDi part or no list of times, the key step is not in the list, the budget is
            below one trajectory, or as `attach`.
    """
    part = plan.start
    if not isinstance(part, ReDi):
        raise InputError(f"a knowledge base is for a plan whose start is a redi part; got {part!r}")
    if detail_steps < 1:
        raise InputError(f"detail_steps must be at least 1; got {detail_steps}")
    grid = _planned_grid(pipe, plan)
    if part.key_step >= len(grid):
        raise InputError(f"key_step {part.key_step} leaves no value time in a grid of {len(grid)} points; lower it")
    here, there = grid[part.key_step - 1], grid[part.key_step]
    between = [here + (there - here) * step / detail_steps for step in range(1, detail_steps)]
    detailed = plan.model_copy(update={"grid": ExplicitGrid(timesteps=(*grid[: part.key_step], *between, there))})
    kept = _Kept(part.max_bytes - HEADER_BYTES, part.condition is not None)
    for arguments in calls:
        watch = _Watch(here, there, part.condition)
        count = record(pipe, detailed, arguments, watch).images
        if not kept.takes(*watch.trajectories(count)):
            break
    if not kept.keys:
        raise InputError("a knowledge base needs at least one call of the pipeline; got none")
    return KnowledgeBase(
        torch.cat(kept.keys),
        torch.cat(kept.values),
        torch.cat(kept.labels) if kept.labels else None,
        grid[: part.key_step + 1],
        fingerprint(next(iter(denoisers(pipe).values()))),
    )


class _Kept:
    """Trajectories, as many as the budget has room for."""

    def __init__(self, room: int, labelled: bool) -> None:
        self.room, self.labelled = room, labelled
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.labels: list[Tensor] = []

    def takes(self, keys: Tensor, values: Tensor, labels: Tensor | None) -> bool:
        """Keeps what fits; whether there is room for more."""
        each = 4 * keys[0].numel() + (8 if self.labelled else 0)
        fits = min(len(keys), self.room // each)
        if fits <= 0:
            raise InputError(
                f"one trajectory takes {each} bytes and the file's header {HEADER_BYTES}; raise max_bytes of the redi "
                f"part, now {self.room + HEADER_BYTES}"
            )
        self.room -= fits * each
        self.keys.append(keys[:fits].half())
        self.values.append(values[:fits].half())
        if labels is not None:
            self.labels.append(labels[:fits])
        return self.room >= each


def _planned_grid(pipe: Any, plan: Plan) -> tuple[float, ...]:
    run = Run(pipe, copy.deepcopy(pipe.scheduler), folder=plan.folder)
    known = frozenset(inspect.signature(type(pipe).__call__).parameters)
    for part in (plan.solver, plan.grid):
        if part is not None:
            part.prepare(run, known)
    if run.timesteps is None:
        raise InputError("a knowledge base belongs to a list of times; give the plan a grid of type explicit or rule")
    return run.timesteps


class _Watch(CallHook):
    """Keeps the clean samples that one call predicts at the key step and at the value time, and its labels."""

    def __init__(self, here: float, there: float, condition: str | None) -> None:
        self.here, self.there, self.condition = here, there, condition
        self.labels: Tensor | None = None

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        if self.condition is not None and self.labels is None:
            self.labels = class_labels(evaluation, self.condition).cpu()
        return proceed(evaluation)

    def before_step(self, step: Step) -> None:
        if same_time(step.time, self.here):
            self.key = step.x0().cpu()
        if same_time(step.time, self.there):
            self.value = step.x0().cpu()

    def trajectories(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (count, ...) on the CPU, and labels (count,) if they are wanted."""
        labels = None if self.labels is None else self.labels[:count]
        return self.key[:count], self.value[:count], labels
