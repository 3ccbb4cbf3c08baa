"""Conditions of any pipeline, captured from its own call.

The pipeline is called and stopped after its first steps, so that its text encoders, its guidance and its shapes are its
own. In the first call it is found out how the pipeline lays out its evaluations: the network runs once, and what the
pipeline then gets are random numbers of the same shape, different for each branch. What it makes of them for the
scheduler tells the branches apart, and with which sign they are combined.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..samplers import Plan
from ..samplers.call import CallHook, Step
from ..samplers.errors import InputError
from ..samplers.network import Evaluation, output_rows, time_unit
from ..samplers.recording import record
from ..samplers.rows import stacked_branches
from . import row_trees
from .conditions import BESIDE, Branch, Condition, Layout
from .predict import cut_to

_ALIKE = 0.8
"Least cosine between what the scheduler is given and the best combination of the branches."


def encode(pipe: Any, call_kwargs: Mapping[str, Any], layout: Layout | None = None) -> Condition:
    """The condition of one call of a pipeline.

    Both branches of guidance are captured where the call guides: with a scale above 1, and a negative prompt where the
    pipeline needs one. The scale itself is told to the network by pipelines that guide inside of it, and does not
    matter for the others.

    Args:
        pipe: a diffusers pipeline without a plan; as it was afterwards.
        call_kwargs: arguments of its call, such as prompts, labels and sizes. Generators and latents are replaced.
        layout: of an earlier condition of the same pipeline and size: the network is then not run.

    Raises:
        InputError: when the network is told something that changes from step to step (a ControlNet's residuals), or
            the pipeline calls it in a way that is not known.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    arguments = {name: value for name, value in call_kwargs.items() if name not in ("generator", "latents")}
    if "generator" in known:
        arguments["generator"] = torch.Generator("cpu").manual_seed(0)
    watch = _Capture(len(layout.branches)) if layout is not None and not layout.stacked else _Capture(1)
    probe = _Probe()
    with torch.no_grad(), _quiet(pipe):
        try:
            record(pipe, Plan(), arguments, probe if layout is None else watch)
        except _Reached:
            pipe.maybe_free_model_hooks()
    if layout is not None:
        return _condition(layout, watch.seen)
    if probe.step is None or not probe.seen:
        raise InputError(f"{type(pipe).__name__} took no step with its denoiser; there is nothing to learn from")
    return _condition(_layout(pipe, probe), probe.seen)


class _Reached(Exception):
    """The pipeline has shown what it does."""


class _Capture(CallHook):
    """Keeps the evaluations of the first step, and stops before the network runs for the last."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen: list[Evaluation] = []

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        self.seen.append(evaluation)
        if len(self.seen) == self.count:
            raise _Reached
        return Transformer2DModelOutput(sample=torch.zeros_like(evaluation.x))  # read by name or by place


class _Probe(CallHook):
    """Keeps the evaluations and the result of the first step, and compares with the second."""

    def __init__(self) -> None:
        self.seen: list[Evaluation] = []
        self.outputs: list[Any] = []
        self.step: Step | None = None
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._again = 0

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        if self.step is None:
            output = tree_map_only(Tensor, self._random, proceed(evaluation))
            self.seen.append(evaluation)
            self.outputs.append(output)
            return output
        if self._again < len(self.seen):
            _require_steady(self.seen[self._again], evaluation)
        self._again += 1
        return self.outputs[(self._again - 1) % len(self.outputs)]

    def before_step(self, step: Step) -> None:
        if self.step is not None:
            raise _Reached
        self.step = step

    def _random(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator).to(like)


def _require_steady(first: Evaluation, second: Evaluation) -> None:
    """Raises ``InputError`` where the network is told something else in the second step than in the first."""
    for name, value in first.inputs.items():
        if name in (first.state_name, first.time_name):
            continue
        if not row_trees.same(value, second.inputs.get(name)):
            raise InputError(
                f"{type(first.network).__name__} is told another {name} in each step, so it is no condition; distil "
                "with a pipeline that computes nothing from the samples but the network (no ControlNet)"
            )


def _layout(pipe: Any, probe: _Probe) -> Layout:
    """How the pipeline calls its network, from the evaluations of a step and what the scheduler was given."""
    step, first = probe.step, probe.seen[0]
    assert step is not None
    shown = first.inputs[first.state_name]
    listed = isinstance(shown, list | tuple)
    state = torch.stack(tuple(shown)) if listed else first.x
    unit_dim = _unit_dim(state, step.x)
    samples = state if unit_dim is None else state.squeeze(unit_dim)
    beside_dim = _beside_dim(samples, step.x)
    alone = samples if beside_dim is None else samples.narrow(beside_dim, 0, step.x.shape[beside_dim])
    stack = stacked_branches({first.state_name: alone}) if len(probe.seen) == 1 else 1
    x, output = (rows[: len(state) // stack] for rows in (step.x, step.output))
    told = torch.as_tensor(first.inputs[first.time_name])
    if told.ndim > 1:
        raise InputError(f"{type(first.network).__name__} is told {tuple(told.shape)} times; fewstep knows one a row")
    divisor, from_one = _time_told(first, float(told.reshape(-1)[0]))
    branches, sign = _branches(type(pipe).__name__, _halves(probe, stack, unit_dim, x), output)
    return Layout(
        pipeline=type(pipe).__name__,
        component=first.component,
        state=first.state_name,
        time=first.time_name,
        divisor=divisor,
        from_one=from_one,
        time_dtype=str(told.dtype if told.is_floating_point() else torch.float32).removeprefix("torch."),
        dtype=str(state.dtype).removeprefix("torch."),
        shape=tuple(x.shape[1:]),
        unit_dim=unit_dim,
        listed=listed,
        beside_dim=beside_dim,
        sign=sign,
        branches=branches,
        stacked=stack > 1,
    )


def _unit_dim(state: Tensor, x: Tensor) -> int | None:
    if state.ndim != x.ndim + 1:
        return None
    return next((dim for dim in range(1, state.ndim) if state.squeeze(dim).shape[1:] == x.shape[1:]), None)


def _beside_dim(state: Tensor, x: Tensor) -> int | None:
    """The dimension along which the network is shown more than the samples, which come first."""
    if state.ndim == x.ndim:
        more = [dim for dim in range(1, x.ndim) if state.shape[dim] != x.shape[dim]]
        if not more:
            return None
        if len(more) == 1 and state.shape[more[0]] > x.shape[more[0]]:
            return more[0]
    raise InputError(
        f"the scheduler steps samples of shape {tuple(x.shape[1:])} and the network is shown {tuple(state.shape[1:])}; "
        "fewstep knows networks that are shown the samples, and something behind them along one dimension"
    )


def _time_told(evaluation: Evaluation, told: float) -> tuple[float, bool]:
    """What the scheduler's time is divided by for the network, and whether that is taken from 1."""
    unit = time_unit(evaluation.time, told, type(evaluation.network).__name__)
    at_quarter: float = unit(torch.tensor(250.0, dtype=torch.float64)).item()
    return {250.0: (1.0, False), 0.25: (1000.0, False), 0.75: (1000.0, True)}[at_quarter]


def _halves(probe: _Probe, stack: int, unit_dim: int | None, x: Tensor) -> list[Tensor]:
    """What the network answered for each branch, in the shape of the samples."""
    rows = [cut_to(output_rows(output), unit_dim, tuple(x.shape[1:])) for output in probe.outputs]
    return list(rows[0].chunk(stack)) if stack > 1 else rows


def _branches(pipeline: str, answers: list[Tensor], given: Tensor) -> tuple[tuple[str, ...], float]:
    """Which of the answers is the conditional one, and the sign with which they reach the scheduler.

    Guidance gives sign (g cond + (1 - g) uncond) with g above 1: of the two coefficients, which least squares finds,
    the conditional one is the larger. A pipeline that then rescales vectors of it keeps their directions.

    Raises:
        InputError: when there are more than two, or the scheduler is given something else.
    """
    if len(answers) > 2:
        raise InputError(
            f"{pipeline} guides by {len(answers)} branches; fewstep distils guidance of two, so leave one of its "
            "guidance scales off"
        )
    columns = torch.stack([answer.double().flatten() for answer in answers], 1).cpu()
    wanted = given.double().flatten().cpu()
    factors = torch.linalg.lstsq(columns, wanted[:, None]).solution[:, 0]
    alike = torch.nn.functional.cosine_similarity(columns @ factors, wanted, dim=0)
    if not float(alike) > _ALIKE:
        raise InputError(
            f"{pipeline} does not combine what its network predicts as uncond + scale (cond - uncond); switch its "
            "other guidance off"
        )
    cond = int(factors.abs().argmax())
    names = ("cond",) if len(answers) == 1 else ("cond", "uncond") if cond == 0 else ("uncond", "cond")
    return names, 1.0 if float(factors[cond]) > 0 else -1.0


def _condition(layout: Layout, seen: list[Evaluation]) -> Condition:
    """The branches in some evaluations of one step."""
    rows = seen[0].rows
    count = rows // (len(layout.branches) if layout.stacked else 1)
    branches: dict[str, Branch] = {}
    for place, name in enumerate(layout.branches):
        inputs = _inputs(layout, seen[0 if layout.stacked else place])
        rowed = row_trees.paths_with_rows(inputs, rows, layout.listed)
        picks = torch.arange(count) + (place * count if layout.stacked else 0)
        own = row_trees.picked(inputs, rowed, picks, rows)
        branches[name] = Branch(tree_map_only(Tensor, torch.clone, own), rowed)
    return Condition(layout, count, branches["cond"], branches.get("uncond"))


def _inputs(layout: Layout, evaluation: Evaluation) -> dict[str, Any]:
    """The arguments of an evaluation that are conditions.

    Raises:
        InputError: when the samples have another shape than the layout says.
    """
    inputs = dict(evaluation.inputs)
    shown = inputs.pop(layout.state)
    for name in (layout.time, "return_dict"):
        inputs.pop(name, None)
    state = torch.stack(tuple(shown)) if layout.listed else shown
    if layout.unit_dim is not None:
        state = state.squeeze(layout.unit_dim)
    dim = layout.beside_dim
    if dim is not None:
        size = layout.shape[dim - 1]
        inputs[BESIDE] = state.narrow(dim, size, state.shape[dim] - size)
        state = state.narrow(dim, 0, size)
    if tuple(state.shape[1:]) != layout.shape:
        raise InputError(
            f"the network is shown samples of shape {tuple(state.shape[1:])} and the layout says {layout.shape}; give "
            "every call the same sizes"
        )
    return inputs


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """No progress bar until the block ends."""
    kept = vars(pipe).get("_progress_bar_config")
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if kept is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = kept
