"""Classifier-free guidance that changes over the steps, and is not computed where it is off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from .call import CallHook, Step
from .errors import InputError
from .guidance import GUIDANCES
from .network import Evaluation, output_tensor, with_output_tensor
from .part import Part, Run
from .rows import NOT_BATCHED


@GUIDANCES.register("guidance")
class GuidanceSchedule(Part):
    """A guidance scale for each step, a window of steps, or both, on any pipeline that guides by two branches.

    The result of a guided step is uncond + scale (cond - uncond) (arXiv:2207.12598, Eq. 6, whose w is scale - 1).
    A list of scales is the dynamic guidance of invertible consistency distillation (arXiv:2406.14539), a window the
    guidance interval of arXiv:2404.07724 in steps. Where the scale is 1 the unconditional branch is not evaluated: a
    pipeline that stacks both branches in one batch runs half of it, one that runs them in turn runs the first.

    Which branch is which is not assumed: the first step runs both and is compared with what the pipeline made of them
    (the second one too where the branches were equal). That costs one evaluation where the first step is outside the
    window. Pipelines that evaluate the unconditional branch first, or combine otherwise, are refused in that step.

    On the demo ``fashion-dit`` the first third of the steps can do without guidance at no cost in fd_fashion or
    accuracy, and the last steps cannot (docs/samplers.md).
    """

    type: Literal["guidance"] = "guidance"
    scale: float | tuple[float, ...] = Field(
        description="The pipeline's guidance scale, at least 1 (off): one for all steps, or one for each."
    )
    window: tuple[float, float] = Field(
        default=(0.0, 1.0), description="Fractions of the steps between which guidance is on: start <= i/steps < stop."
    )
    rescale: float | None = Field(
        default=None, ge=0, le=1, description="The pipeline's guidance_rescale (arXiv:2305.08891, Section 3.4)."
    )

    @field_validator("scale")
    @classmethod
    def _at_least_one(cls, scale: float | tuple[float, ...]) -> float | tuple[float, ...]:
        scales = scale if isinstance(scale, tuple) else (scale,)
        if not scales or max(scales) <= 1:
            raise ValueError(f"no scale above 1 means no guidance; got {scale}; use a 'constant' guidance of 1")
        if min(scales) < 1:
            raise ValueError(f"scales are at least 1, which is off; got {min(scales):g}")
        return scale

    @field_validator("window")
    @classmethod
    def _ordered(cls, window: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= window[0] < window[1] <= 1:
            raise ValueError(f"a window is a pair 0 <= start < stop <= 1; got {window}")
        return window

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Sets the pipeline's scale in the call and adds the hook.

        Raises:
            InputError: when the pipeline takes no guidance scale, or a list of scales does not fit the grid.
        """
        steps = run.call_arguments.get("num_inference_steps")
        if isinstance(self.scale, tuple) and len(self.scale) != steps:
            raise InputError(
                f"the guidance part lists {len(self.scale)} scales and the plan has "
                f"{'no grid' if steps is None else f'{steps} steps'}; give one scale a step, and a grid part"
            )
        first = self.scale[0] if isinstance(self.scale, tuple) else self.scale
        own = first if first > 1 else max(self.scale) if isinstance(self.scale, tuple) else self.scale
        name = "true_cfg_scale" if "true_cfg_scale" in known_arguments else "guidance_scale"
        run.set_argument("guidance", name, own, known_arguments)
        if self.rescale is not None:
            run.set_argument("guidance", "guidance_rescale", self.rescale, known_arguments)
        run.hooks.append(lambda: _GuidanceHook(self, own, run.scheduler))

    def scale_at(self, index: int, steps: int) -> float:
        """The scale of step ``index`` of ``steps``; 1 is off."""
        if not self.window[0] <= index / steps < self.window[1]:
            return 1.0
        if not isinstance(self.scale, tuple):
            return self.scale
        if len(self.scale) != steps:
            raise InputError(
                f"the guidance part lists {len(self.scale)} scales and the scheduler takes {steps} steps; solvers with "
                "two evaluations a step take one scale with a window"
            )
        return self.scale[index]


@dataclass(frozen=True)
class _Branches:
    """How a pipeline evaluates its two branches.

    Attributes:
        stacked: both in one batch; otherwise in turn, the conditional one first.
        cond_first: the conditional rows are the first half of a stacked batch.
        sign: what the pipeline multiplies the combination with before the scheduler sees it.
    """

    stacked: bool
    cond_first: bool
    sign: float

    def cond_half(self, rows: Tensor) -> Tensor:
        return rows.chunk(2)[0 if self.cond_first else 1]

    def uncond_half(self, rows: Tensor) -> Tensor:
        return rows.chunk(2)[1 if self.cond_first else 0]


class _GuidanceHook(CallHook):
    """Moves the unconditional branch so that the pipeline's own formula, at its own scale, gives the wanted result."""

    def __init__(self, part: GuidanceSchedule, own: float, scheduler: Any) -> None:
        self.part, self.own, self.scheduler = part, own, scheduler
        self.branches: _Branches | None = None
        self.outputs: list[Tensor] = []
        self.stacked = False
        self.cond_output: Any = None

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        scale = self._scale(evaluation.index)
        if evaluation.ordinal == 0:
            self.outputs = []
        if self.branches is None:
            self.stacked = _is_stacked(evaluation.x)
            output = proceed(evaluation)
            self.outputs.append(output_tensor(output))
            return output
        if not self.branches.stacked:
            return self._in_turn(evaluation, proceed, scale)
        if scale == 1:
            output = proceed(_half(evaluation, self.branches))
            return with_output_tensor(output, torch.cat([output_tensor(output)] * 2))
        output = proceed(evaluation)
        if scale == self.own:
            return output
        tensor = output_tensor(output)
        cond, uncond = self.branches.cond_half(tensor), self.branches.uncond_half(tensor)
        moved = self._moved(cond, uncond, scale)
        return with_output_tensor(output, torch.cat([cond, moved] if self.branches.cond_first else [moved, cond]))

    def before_step(self, step: Step) -> None:
        if self.branches is not None:
            return
        pairs = self._pairs()
        self.branches = _learned(pairs, len(self.outputs) == 1, step.output, self.own)
        scale = self._scale(step.index)
        if self.branches is not None and scale != self.own:
            guided = _guided(*pairs[self.branches.cond_first], scale)
            step.output = self.branches.sign * _shaped_like(guided, step.output)

    def _scale(self, index: int) -> float:
        return self.part.scale_at(index, len(self.scheduler.timesteps))

    def _in_turn(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any], scale: float) -> Any:
        if evaluation.ordinal == 0:
            self.cond_output = proceed(evaluation)
            return self.cond_output
        if scale == 1:
            return self.cond_output
        output = proceed(evaluation)
        if scale == self.own:
            return output
        return with_output_tensor(output, self._moved(output_tensor(self.cond_output), output_tensor(output), scale))

    def _moved(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """uncond' with uncond' + own (cond - uncond') = uncond + scale (cond - uncond)."""
        return torch.lerp(cond, uncond, (scale - 1) / (self.own - 1))

    def _pairs(self) -> dict[bool, tuple[Tensor, Tensor]]:
        """The conditional and the unconditional output of the step, if the first one is, and is not, conditional.

        Raises:
            InputError: when there were not two branches.
        """
        outputs = self.outputs
        if len(outputs) == 1 and self.stacked:
            outputs = list(outputs[0].chunk(2))
        if len(outputs) != 2:
            raise InputError(
                f"the pipeline made {len(self.outputs)} evaluation(s) in a step and no two branches of guidance; give "
                "it a negative prompt where it needs one, or remove the guidance part"
            )
        return {True: (outputs[0], outputs[1]), False: (outputs[1], outputs[0])}


def _learned(
    pairs: dict[bool, tuple[Tensor, Tensor]], stacked: bool, combined: Tensor, scale: float
) -> _Branches | None:
    """Which branch is which, from what the pipeline made of both; None where they are too alike to tell.

    Raises:
        InputError: when they were not combined as guidance, or cannot be left out.
    """
    fits = {order: _misfit(_guided(*pair, scale), combined) for order, pair in pairs.items()}
    cond_first = min(fits, key=lambda order: fits[order][0])
    (misfit, sign), (other, _) = fits[cond_first], fits[not cond_first]
    if misfit > 16 * torch.finfo(pairs[True][0].dtype).eps:
        raise InputError(
            "this pipeline does not combine its branches as uncond + scale (cond - uncond); use a 'constant' guidance"
        )
    if misfit >= 0.1 * other:
        return None
    if not stacked and not cond_first:
        raise InputError(
            "this pipeline evaluates its unconditional branch first: it cannot be left out; use a 'constant' guidance"
        )
    return _Branches(stacked, cond_first, sign)


def _guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    return uncond + scale * (cond - uncond)


def _misfit(guided: Tensor, combined: Tensor) -> tuple[float, float]:
    """How far ``combined`` is from ``guided``, vectors of the last dimension rescaled, relative; and its sign."""
    a, b = _shaped_like(guided, combined).double(), combined.double()
    scale = (a * b).sum(-1, keepdim=True) / (a * a).sum(-1, keepdim=True).clamp(min=1e-30)
    sign = 1.0 if float((a * b).sum()) >= 0 else -1.0
    return float((b - scale * a).norm() / b.norm().clamp(min=1e-30)), sign


def _shaped_like(guided: Tensor, combined: Tensor) -> Tensor:
    """One branch's output in the shape that the scheduler is given.

    The rows may be stacked twice, and the channels of a learned variance left out.

    Raises:
        InputError: when the shapes have nothing to do with each other.
    """
    if len(combined) == 2 * len(guided):
        guided = torch.cat([guided, guided])
    if guided.ndim == combined.ndim and guided.shape[1] == 2 * combined.shape[1]:
        guided = guided[:, : combined.shape[1]]
    if guided.shape != combined.shape:
        raise InputError(
            f"the network gives {tuple(guided.shape)} and the scheduler is given {tuple(combined.shape)}; this "
            "pipeline takes no guidance part but a 'constant' one"
        )
    return guided


def _is_stacked(x: Tensor) -> bool:
    """Whether the second half of the batch repeats the first."""
    return len(x) % 2 == 0 and torch.equal(*x.chunk(2))


def _half(evaluation: Evaluation, branches: _Branches) -> Evaluation:
    """The conditional rows of a stacked evaluation."""
    rows = evaluation.rows
    kept = torch.arange(rows) if evaluation.kept is None else torch.tensor(evaluation.kept)

    def halved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return branches.cond_half(value) if value.ndim and len(value) == rows else value
        if isinstance(value, dict):
            return {name: halved(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(halved(item) for item in value)
        return value

    inputs = {name: halved(value) for name, value in evaluation.inputs.items() if name not in NOT_BATCHED}
    return replace(evaluation.with_inputs(**inputs), kept=tuple(branches.cond_half(kept).tolist()))
