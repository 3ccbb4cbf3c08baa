"""One call of an attached pipeline: what it counts, and where parts of the plan act on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .branches import Branches
from .cache_call import CacheHook, Inside
from .network import NOTHING, Additions, Evaluation, batch_rows, named_inputs, run_network
from .process import Process
from .stats import Counter


@dataclass
class Step:
    """One step of the scheduler, while it is taken.

    Attributes:
        index: position in the scheduler's timesteps.
        time: where the step starts, in the scheduler's units.
        next_time: where it ends; the process's clean time for the last one.
        process: the forward process.
        scheduler: the scheduler, ours.
        output: (B, ...) what the network predicts, guidance applied. A hook may replace it before the step.
        x: (B, ...) the state alpha x0 + sigma eps at ``time``. A hook may replace it before the step.
        x_next: (B, ...) the state at ``next_time``, after the step. A hook may replace it after the step.
    """

    index: int
    time: float
    next_time: float
    process: Process
    scheduler: Any
    output: Tensor
    x: Tensor
    x_next: Tensor | None = None

    def x0(self) -> Tensor:
        """The clean samples that the output means, (B, ...)."""
        return self.process.to_x0(self.output, self.x, self.time)


class CallHook:
    """What a part of a plan does during one call. Override what it needs; a fresh one is made for each call."""

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        """Runs, changes or replaces an evaluation of the network; ``proceed`` runs the rest of the plan and then it.

        Returns:
            What the network returned, or the like.
        """
        return proceed(evaluation)

    def before_step(self, step: Step) -> None:
        """Sees a step, and may replace its ``output`` or ``x``."""

    def after_step(self, step: Step) -> None:
        """Sees where the step landed, and may replace its ``x_next``."""


@dataclass
class Call:
    """One running call: counts evaluations and steps, and hands both to the hooks in the order of the plan.

    Args:
        networks: the pipeline's denoisers by component name.
        scheduler: the attached scheduler.
        hooks: what the parts do.
        process: the forward process; None where there are no hooks.
        generator: the call's generator, or one for each sample: for pipelines that give the scheduler none.
        caches: what the plan's caches do, beneath the hooks.
        additions: what layers of the networks add to their outputs, by component name, beneath the caches.
    """

    networks: Mapping[str, nn.Module]
    scheduler: Any
    hooks: Sequence[CallHook] = ()
    process: Process | None = None
    generator: Any = None
    counter: Counter = field(default_factory=Counter)
    caches: Sequence[CacheHook] = ()
    additions: Mapping[str, Additions] = field(default_factory=dict)
    _index: int | None = None
    _ordinal: int = 0
    _branches: Branches = field(default_factory=Branches)

    def __post_init__(self) -> None:
        self._watched = {id(module): (cache, name) for cache in self.caches for name, module in cache.modules.items()}

    @property
    def modules(self) -> Iterable[nn.Module]:
        """All modules whose calls this one wants to see."""
        yield from self.networks.values()
        for cache in self.caches:
            yield from cache.modules.values()
        for additions in self.additions.values():
            yield from additions

    def listens_to(self, module: nn.Module) -> bool:
        """Whether ``module`` is one of the pipeline's denoisers."""
        return any(module is mine for mine in self.networks.values())

    def evaluate(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One evaluation that the pipeline asks for: through the hooks and the caches, to the network."""
        component = next(name for name, mine in self.networks.items() if mine is module)
        if not self.hooks and not self.caches:
            self.counter.evaluation(batch_rows({str(i): value for i, value in enumerate(args)} | kwargs), component)
            return run_network(module, args, kwargs, additions=self.additions.get(component, NOTHING))
        index = self.position()
        inputs = named_inputs(module, args, kwargs)
        branch = self._branches.of(component, inputs, self._ordinal)
        evaluation = Evaluation(component, module, inputs, index, self._ordinal, self._time(index), branch)
        self._ordinal += 1
        return self._proceed(0)(evaluation)

    def _time(self, index: int) -> float:
        times = getattr(self.scheduler, "timesteps", None)
        return float(times[index]) if times is not None and index < len(times) else math.nan

    def _proceed(self, depth: int) -> Callable[[Evaluation], Any]:
        through: tuple[CallHook | CacheHook, ...] = (*self.hooks, *self.caches)
        if depth == len(through):
            return self._run
        return lambda evaluation: through[depth].evaluate(evaluation, self._proceed(depth + 1))

    def _run(self, evaluation: Evaluation) -> Any:
        self.counter.evaluation(evaluation.rows, evaluation.component)
        inside = Inside(self._watched, evaluation, self.counter) if self._watched else None
        additions = self.additions.get(evaluation.component, NOTHING)
        output = run_network(evaluation.network, (), evaluation.inputs, inside, additions)
        if self.caches:
            self.counter.held(sum(cache.held_bytes() for cache in self.caches))
        return output

    def position(self, timestep: Any = None) -> int:
        """Position in the scheduler's timesteps of the step that is being taken.

        Args:
            timestep: where the pipeline says that it is; it says so to the scheduler before the first evaluation,
                or starts at the scheduler's begin index.
        """
        if self._index is None:
            begin = getattr(self.scheduler, "begin_index", None)
            if timestep is not None and begin is None:
                begin = int((self.scheduler.timesteps - timestep).abs().argmin())
            self._index = begin or 0
        return self._index

    def generator_of(self, rows: int) -> Any:
        """The call's generator for a batch in which the samples may be stacked several times."""
        if isinstance(self.generator, list) and self.generator:
            return self.generator * max(1, rows // len(self.generator))
        return self.generator

    def begin_step(self, step: Step) -> None:
        """Shows a step to the hooks before it is taken."""
        for hook in self.hooks:
            hook.before_step(step)

    def end_step(self, step: Step) -> None:
        """Shows a step to the hooks after it was taken."""
        for hook in self.hooks:
            hook.after_step(step)

    def close_step(self, timestep: Any) -> None:
        """Counts a step that was taken."""
        self.counter.step(timestep)
        self._index, self._ordinal = self.position(timestep) + 1, 0
