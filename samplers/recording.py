"""Watching a pipeline sample by a plan: what the makers of start statistics and knowledge bases need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic import SerializeAsAny
from torch import Tensor

from .attach import attach
from .call import CallHook, Step
from .part import Part, Run
from .plan import Plan
from .stats import Stats


class _Recording(Part):
    """Hands the resource ``hook`` to the run. Not registered: it is in no plan that is saved."""

    type: Literal["recording"] = "recording"
    start: SerializeAsAny[Part] | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Those of the start part that runs after the hook."""
        return () if self.start is None else self.start.files

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        hook = run.resource(self.type, "hook")
        run.hooks.append(lambda: hook)
        if self.start is not None:
            self.start.prepare(run, known_arguments)


def record(pipe: Any, plan: Plan, arguments: Mapping[str, Any], hook: CallHook, *, with_start: bool = False) -> Stats:
    """One call of ``pipe`` by ``plan`` with ``hook`` before its start part, or in the place of it.

    Args:
        pipe: a diffusers pipeline without a plan.
        plan: how to sample.
        arguments: of the call.
        hook: sees the call; the pipeline's own noise at the first step.
        with_start: whether the plan's start part runs.

    Returns:
        What the call did.

    Raises:
        InputError: as `attach`.
    """
    recording = _Recording(start=plan.start if with_start else None)
    with attach(pipe, plan.model_copy(update={"start": recording}), {"hook": hook}) as handle:
        pipe(**arguments)
    assert handle.stats is not None
    return handle.stats


def clean_samples(pipe: Any, plan: Plan, calls: Iterable[Mapping[str, Any]]) -> Iterator[Tensor]:
    """What ``pipe`` samples by ``plan``, before it is decoded.

    Args:
        pipe: a diffusers pipeline without a plan.
        plan: how to sample; its start part does not run.
        calls: arguments of the pipeline's calls.

    Yields:
        (images, ...) where the last step of a call landed.
    """
    for arguments in calls:
        last = _Last()
        stats = record(pipe, plan, arguments, last)
        yield last.x[: stats.images]


class _Last(CallHook):
    x: Tensor

    def after_step(self, step: Step) -> None:
        assert step.x_next is not None
        self.x = step.x_next
