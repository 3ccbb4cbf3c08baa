"""What a teacher is guided by, and what its pipeline is told for that."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..samplers import Plan
from ..samplers.errors import InputError
from ..samplers.guidance import ConstantGuidance
from ..samplers.guidance_schedule import GuidanceSchedule
from .conditions import Layout
from .method import Method, Needs

SCALE, TRUE_SCALE = "guidance_scale", "true_cfg_scale"


@dataclass(frozen=True)
class Guiding:
    """How a teacher is guided.

    Attributes:
        scale: of its two branches, g of uncond + g (cond - uncond), where the method says none; 1 for none.
        inside: the scale that a network is told which guides inside; None for all others.
        told: arguments of the pipeline's call with which it shows both branches of guidance, or tells the network.
    """

    scale: float
    inside: float | None
    told: Mapping[str, float]


def guiding(pipe: Any, network: nn.Module, method: Method, teacher: Plan, call_kwargs: Mapping[str, Any]) -> Guiding:
    """The guidance of the teacher's plan, or else of the call's arguments, or else of the pipeline's own default.

    Args:
        pipe: the teacher's pipeline.
        network: its denoiser.
        method: may have guidance scales of its own.
        teacher: how the teacher samples.
        call_kwargs: further arguments of the pipeline's call.

    Raises:
        InputError: for guidance that a student cannot learn.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    own = tuple(getattr(method, SCALE, ()))
    planned = _planned(teacher, TRUE_SCALE if TRUE_SCALE in known else SCALE, method.needs)

    def scale_of(name: str) -> float:
        default = known[name].default if name in known else None
        value = planned.get(name, call_kwargs.get(name, default))
        return float(value) if isinstance(value, int | float) else 1.0

    config = getattr(network, "config", {})
    if SCALE in known and (config.get("guidance_embeds") or config.get("time_cond_proj_dim")):
        if len(set(own)) > 1:
            raise InputError(
                f"{type(network).__name__} is told one guidance scale for all its samples; give --guidance_scale one "
                f"number instead of {' '.join(f'{scale:g}' for scale in own)}"
            )
        if TRUE_SCALE in known and scale_of(TRUE_SCALE) > 1:
            raise InputError(
                f"{type(pipe).__name__} would guide inside its network and by {TRUE_SCALE} at once; a student learns "
                f"one of them, so leave {TRUE_SCALE} out"
            )
        inside = own[0] if own else scale_of(SCALE)
        return Guiding(1.0, inside, {SCALE: inside})
    if _guides_at_one(pipe):
        raise InputError(
            f"{type(pipe).__name__} guides by cond + scale (cond - uncond), which is guidance at a scale of 1 too; "
            "fewstep distils pipelines that do not guide at 1"
        )
    name = TRUE_SCALE if TRUE_SCALE in known else SCALE
    scale = scale_of(name)
    return Guiding(scale, None, {name: scale if scale > 1 else max(scale, *own, 1.0)} if name in known else {})


def refuse_unseen_guidance(layout: Layout, guided: Guiding, method: Method) -> None:
    """Refuses a method that learns guidance, or scales of it, for a pipeline that shows no unconditional branch.

    Raises:
        InputError: naming the pipeline.
    """
    if "uncond" in layout.branches:
        return
    mend = "give --call_kwargs negative_prompt=... where the pipeline needs one"
    if method.learns_guidance:
        raise InputError(
            f"{layout.pipeline} does not guide by an unconditional branch, so {method.type} has nothing to learn; "
            f"take another method, or {mend}"
        )
    if guided.inside is None and set(getattr(method, SCALE, ())) - {1.0}:
        raise InputError(
            f"{layout.pipeline} does not guide by an unconditional branch; leave --guidance_scale out, or {mend}"
        )


def _guides_at_one(pipe: Any) -> bool:
    """Whether a pipeline evaluates both branches at a scale of 1, by its own word."""
    asked = copy.copy(pipe)
    asked.__dict__["_guidance_scale"] = 1.0
    try:
        return bool(asked.do_classifier_free_guidance)
    except AttributeError:  # it has no word for it, or decides by more than the scale
        return False


def _planned(teacher: Plan, name: str, needs: Needs) -> dict[str, float]:
    """The scale in the teacher's plan, by the argument of the pipeline's call that it sets; pairs have any guidance."""
    part = teacher.guidance
    if part is None:
        return {}
    if getattr(part, "rescale", None) is not None and needs != "pairs":
        raise InputError("the teacher's plan rescales its guidance, which a student does not learn; leave rescale out")
    if isinstance(part, ConstantGuidance):
        return {SCALE: part.scale}
    if isinstance(part, GuidanceSchedule) and isinstance(part.scale, float) and part.window == (0.0, 1.0):
        return {name: part.scale}
    if needs == "pairs":
        return {}
    raise InputError(
        f"the guidance {part.type!r} of the teacher's plan changes over the steps; a student learns one scale, so give "
        "a plan with constant guidance"
    )
