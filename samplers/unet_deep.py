"""Reuse of the deep features of a U-Net: on most steps only its outer levels run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .cache import CACHES, CachePart
from .cache_call import CacheHook, Passing
from .errors import InputError
from .forecast import forecast
from .network import Evaluation
from .part import Run
from .unet_cut import Cut, cut_unet


@CACHES.register("unet-deep")
class UNetDeep(CachePart):
    """The deep features of a U-Net, kept for some steps, after DeepCache (arXiv:2312.00858, Section 3.2).

    A U-Net goes down its levels and up again, and the features that come up from the inner levels change slowly from
    step to step. On the steps that compute, all of it runs, and the tensor that enters the outer part of the way up is
    kept. On the others only the outer part runs, down and up, on that tensor; the modules between answer with zeros of
    the right shape that take no memory, which nothing reads.

    ``depth`` and ``layer`` say where the outer part ends: on the way down all levels before ``depth`` and the first
    ``layer`` layers of it run, on the way up the layers that these are joined to. In the package of the paper's authors
    this is ``cache_branch_id = 3 * depth + layer``.

    Steps are counted from the first one of the call, also where it starts in the middle of the grid, and Heun's two
    evaluations at one time are two steps. A branch of guidance that a window left out of the last step that computes
    runs whole when it returns.

    FreeU and T2I-Adapters write into the features in place; with them copies are kept and the zeros take memory.
    ControlNets and IP-Adapters act on what runs. Compiled blocks stay compiled, skipped or not; where the cut goes
    through one, and in a U-Net that is compiled as a whole, the graph breaks at each module that can be skipped.

    With an ``order`` the outer part runs on a forecast: the polynomial in the step's position through the last 2 or 3
    tensors that were computed, as TaylorSeer (arXiv:2503.06923) does in transformers; until there are as many the order
    is lower.
    """

    type: Literal["unet-deep"] = "unet-deep"
    interval: int | None = Field(default=None, ge=1, description="All is computed in one of so many steps, on average.")
    schedule: Literal["uniform", "quadratic"] = Field(
        default="uniform", description="How the steps that compute are spaced: evenly, or close around a center."
    )
    center: float | None = Field(
        default=None, ge=0, le=1, description="Fraction of the steps that a quadratic schedule is close around; 0.3."
    )
    power: float | None = Field(
        default=None, ge=1, description="How unevenly a quadratic schedule is spaced; 1 is even; 1.4."
    )
    steps: tuple[int, ...] | None = Field(
        default=None,
        description="Instead of an interval: the steps that compute, counted from 0, which is one of them.",
    )
    depth: int = Field(default=0, ge=0, description="Level of the cut; 0 is the outermost.")
    layer: int | None = Field(
        default=0, ge=0, description="Layers of that level that run before the cut on the way down; null for all."
    )
    order: int = Field(default=0, ge=0, le=2, description="Degree of the forecast; 0 reuses the last features.")

    @model_validator(mode="after")
    def _one_schedule(self) -> UNetDeep:
        if (self.interval is None) == (self.steps is None):
            raise ValueError(f"give an interval or a list of steps; got interval={self.interval}, steps={self.steps}")
        if self.steps is not None and self.schedule == "quadratic":
            raise ValueError("a quadratic schedule has an interval; leave out the list of steps")
        if self.schedule == "uniform" and (self.center, self.power) != (None, None):
            raise ValueError(
                f"center and power are of a quadratic schedule; got center={self.center}, power={self.power} in a "
                "uniform one"
            )
        if self.steps is not None and (self.steps[:1] != (0,) or list(self.steps) != sorted(set(self.steps))):
            raise ValueError(f"steps begin with 0 and increase; got {self.steps}")
        return self

    @classmethod
    def suggest(cls, pipe: Any, steps: int) -> UNetDeep:
        """Every second step computes, and the cut is as far out as it can be.

        Raises:
            InputError: when no network of the pipeline is a U-Net that can be cut.
        """
        try:
            part = cls(interval=2)
            part.modules(pipe)
        except InputError:
            part = cls(interval=2, layer=None)
            part.modules(pipe)
        return part

    def reach(self, network: nn.Module) -> tuple[str, ...]:
        """The blocks and layers inside the cut.

        Raises:
            InputError: when the network has no levels that can be cut there.
        """
        return cut_unet(network, self.depth, self.layer).inside

    def computes(self, steps: int) -> tuple[bool, ...]:
        """Of each of ``steps`` steps, whether all of the network runs.

        Raises:
            InputError: when a listed step is not among them.
        """
        if self.steps is not None and self.steps[-1] >= steps:
            raise InputError(
                f"the unet-deep cache computes at step {self.steps[-1]} and the last of {steps} steps is {steps - 1}; "
                "list smaller steps"
            )
        chosen = self.chosen(steps)
        return tuple(index in chosen for index in range(steps))

    def chosen(self, steps: int) -> frozenset[int]:
        """The steps that compute, of ``steps``."""
        if self.steps is not None:
            return frozenset(self.steps)
        interval = self.interval or 1
        if self.schedule == "uniform":
            return frozenset(range(0, steps, interval))
        center = 0.3 if self.center is None else self.center
        return frozenset(quadratic_steps(steps, interval, center, 1.4 if self.power is None else self.power))

    def make(self, modules: Mapping[str, nn.Module], run: Run) -> CacheHook:
        """What the cache does in one call."""
        components = {name.split(".")[0] for name in modules}
        cuts = {name: cut_unet(getattr(run.pipe, name), self.depth, self.layer) for name in components}
        return _Deep(modules, cuts, lambda first: self.chosen(len(run.scheduler.timesteps) - first), self.order)


def quadratic_steps(steps: int, interval: int, center: float, power: float) -> list[int]:
    """The non-uniform 1:N choice of arXiv:2312.00858, Section 3.3: k = ceil(steps / N) steps, close around a center.

    i_j = floor(l_j^p + c), with l_j even between (-c)^(1/p) and (steps - c)^(1/p), signs outside the powers, for j
    from 0 to k - 1. Where two fall together p is lowered by 0.02 until none do; at p = 1 the steps are even.

    Args:
        steps: of the call.
        interval: N.
        center: c as a fraction of the steps.
        power: p, at least 1.
    """
    count, middle = math.ceil(steps / interval), center * steps
    while True:
        low, high = (_signed_power(end, 1 / power) for end in (-middle, steps - middle))
        lines = (low + (high - low) * index / count for index in range(count))
        found = [math.floor(_signed_power(line, power) + middle + 1e-9) for line in lines]
        if len(set(found)) == count:
            return found
        power = max(1.0, power - 0.02)


def _signed_power(value: float, power: float) -> float:
    return math.copysign(abs(value) ** power, value)


@dataclass(frozen=True)
class _Blank:
    """Shape and type of a tensor that nothing reads."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    rows: int

    def zeros(self, rows: int) -> Tensor:
        """Zeros of that shape for ``rows`` rows; a single one in memory."""
        shape = self.shape
        if shape and shape[0] % self.rows == 0:
            shape = (shape[0] // self.rows * rows, *shape[1:])
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(shape)


class _Deep(CacheHook):
    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        cuts: Mapping[str, Cut],
        chosen: Callable[[int], frozenset[int]],
        order: int,
    ) -> None:
        super().__init__(modules)
        self.order = order
        self.choose = chosen
        self.chosen: frozenset[int] = frozenset()
        self.first: int | None = None
        self.networks = frozenset(cuts)
        self.gives = {f"{component}.{name}" for component, cut in cuts.items() for name in cut.gives}
        self.giver: dict[str, str] = {}
        self.blanks: dict[tuple[int, str], Any] = {}
        self.computed: dict[tuple[str, int], int] = {}
        self.count = 0
        self.features: Any = None
        self.written = False

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        """Decides about the evaluation as a whole."""
        if evaluation.component not in self.networks:
            return proceed(evaluation)
        if self.first is None:
            self.first = evaluation.index
            self.chosen = self.choose(self.first)
        self.count = evaluation.index - self.first
        self.written = _writes_in_place(evaluation)
        last = max((step for step in self.chosen if step <= self.count), default=0)
        kept = self.computed.get((evaluation.component, evaluation.branch), -1)
        self.features = None
        if self.count not in self.chosen and kept >= last:
            values = self.memory.recall("features", evaluation)
            self.features = forecast(values, self.count) if values else None
        return proceed(evaluation)

    def pass_module(self, passing: Passing) -> Any:
        """Runs a module inside the cut, or answers with the kept features or with zeros."""
        evaluation, name = passing.evaluation, passing.name
        blank = self.blanks.get((evaluation.branch, name))
        if self.features is None or blank is None:
            return self._run(passing)
        if name == self.giver[evaluation.component]:
            return self._copied(self.features)
        return self._copied(tree_map_only(_Blank, lambda leaf: leaf.zeros(evaluation.rows), blank))

    def _run(self, passing: Passing) -> Any:
        evaluation, name, output = passing.evaluation, passing.name, passing.run()
        if self.features is None:
            self.blanks[evaluation.branch, name] = tree_map_only(
                Tensor,
                lambda leaf: _Blank(tuple(leaf.shape), leaf.dtype, leaf.device, evaluation.rows),
                output,
            )
            if name in self.gives:
                self.giver[evaluation.component] = name
                older = self.memory.recall("features", evaluation) if self.order else None
                earlier = [value for value in older or () if value[0] != self.count]
                values = ((self.count, self._copied(output)), *earlier[: self.order])
                self.memory.keep("features", values, evaluation)
                self.computed[evaluation.component, evaluation.branch] = self.count
        return output

    def _copied(self, tree: Any) -> Any:
        return tree_map_only(Tensor, torch.clone, tree) if self.written else tree


def _writes_in_place(evaluation: Evaluation) -> bool:
    """Whether the network writes into what its blocks give it: FreeU and T2I-Adapters do."""
    inputs = evaluation.inputs
    if inputs.get("down_intrablock_additional_residuals") is not None:
        return True
    if (
        inputs.get("down_block_additional_residuals") is not None
        and inputs.get("mid_block_additional_residual") is None
    ):
        return True
    blocks: Any = evaluation.network.up_blocks
    return any(getattr(block, "s1", None) is not None for block in blocks)
