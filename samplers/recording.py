"""Watching a pipeline sample by a plan: what the makers of start statistics and knowledge bases need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from .attach import attach
from .call import CallHook, Step
from .part import Part, Run
from .plan import Plan
from .stats import Stats


class _Recording(Part):
    """Hands the resource ``hook`` to the run. Not registered: it is in no plan that is saved."""

    type: Literal["recording"] = "recording"

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        hook = run.resource(self.type, "hook")
        run.hooks.append(lambda: hook)


def record(pipe: Any, plan: Plan, arguments: Mapping[str, Any], hook: CallHook) -> Stats:
    """One call of ``pipe`` by ``plan`` with ``hook`` in the place of its start part.

    Args:
        pipe: a diffusers pipeline without a plan.
        plan: how to sample; its start part does not run.
        arguments: of the call.
        hook: sees the call.

    Returns:
        What the call did.

    Raises:
        InputError: as `attach`.
    """
    with attach(pipe, plan.model_copy(update={"start": _Recording()}), {"hook": hook}) as handle:
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
