"""Threshold gates: blocks are computed again for the samples whose features changed enough, and for no others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .cache import CACHES, CachePart
from .cache_call import CacheHook, Passing
from .errors import InputError
from .gate_criteria import CRITERIA
from .network import Evaluation
from .part import Run
from .rows import stacked_branches
from .stack_pass import Layouts, StackPass
from .stacks import block_names


@CACHES.register("gate")
class Gate(CachePart):
    """A sample takes what the blocks added before, until a cheap sign says that they would add something else.

    The sign is the relative L1 change mean|f - g| / mean|g| of some features f of the sample from kept ones g.

    ``first-block``: f is what the first block adds, g the same when the others were last computed: the first-block
    cache of ParaAttention, which diffusers has too. The first block always runs.

    ``modulated-input``: f is what the first block shows its attention, norm and modulation done, and g the same one
    step before; the changes, each through a polynomial, are summed until they reach the threshold: TeaCache
    (arXiv:2411.19108, Eqs. 5 and 6). No block runs in a step without samples to compute.

    Both decide for a whole batch elsewhere; here each sample decides for itself, once for all its branches of
    guidance: by the one that changed most where they are stacked in a batch, by the first where they are evaluated in
    turn. Rows that are to be computed go through the blocks without the others.

    It takes any transformer whose blocks add to their streams and treat the rows of a batch apart.
    """

    type: Literal["gate"] = "gate"
    threshold: float = Field(default=0.1, ge=0, description="Change from which a sample is computed; 0: always.")
    criterion: Literal["first-block", "modulated-input"] = Field(
        default="first-block", description="Which features tell."
    )
    coefficients: tuple[float, ...] | None = Field(
        default=None, description="Polynomial of a change of the modulated input, highest power first; none: as it is."
    )
    warmup: int = Field(default=1, ge=1, description="First steps of a call that compute everything.")
    last_steps: int = Field(default=0, ge=0, description="Last steps that compute everything.")
    max_skips: int | None = Field(default=None, ge=1, description="Most steps in a row that a sample skips.")

    @model_validator(mode="after")
    def _coefficients_have_a_use(self) -> Gate:
        if self.coefficients is not None and self.criterion != "modulated-input":
            raise ValueError(
                f"coefficients are for the criterion 'modulated-input'; got {self.criterion!r}; leave them out"
            )
        if self.coefficients == ():
            raise ValueError("a polynomial has coefficients; got (); leave them out for changes as they are")
        return self

    def reach(self, network: nn.Module) -> tuple[str, ...]:
        """The blocks of the network.

        Raises:
            InputError: when it has no stack of them, or the criterion leaves none to skip.
        """
        names = block_names(network)
        if len(names) <= CRITERIA[self.criterion].always:
            raise InputError(
                f"{type(network).__name__} has {len(names)} block, which the criterion {self.criterion!r} always "
                "computes; take 'modulated-input'"
            )
        return names

    def computes(self, steps: int) -> tuple[bool, ...] | None:
        """None: the data decide; unless the settings leave them no step."""
        if self.threshold == 0 or self.warmup + self.last_steps >= steps:
            return (True,) * steps
        return None

    def make(self, modules: Mapping[str, nn.Module], run: Run) -> CacheHook:
        """The gate of one call."""
        return _GateHook(modules, self, run.scheduler)


@dataclass(frozen=True)
class _Decision:
    """Which samples compute in a step.

    Attributes:
        index: of the step.
        computes: bool (samples,), or (1,) for all of them.
    """

    index: int
    computes: Tensor

    def is_for(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation is another one of the same step and samples."""
        follows = evaluation.ordinal > 0 and evaluation.index == self.index
        return follows and evaluation.rows % len(self.computes) == 0


class _GateHook(CacheHook):
    def __init__(self, modules: Mapping[str, nn.Module], part: Gate, scheduler: Any) -> None:
        super().__init__(modules)
        self.part, self.scheduler = part, scheduler
        self.layouts = Layouts()
        self.criterion = CRITERIA[part.criterion](self.memory, self.layouts, part.coefficients)
        self._way: StackPass | None = None
        self._first_index: int | None = None
        self._decisions: dict[str, _Decision] = {}

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        self._way = None
        output = proceed(evaluation)
        if self._way is not None:
            self._way.finish()
        return output

    def pass_module(self, passing: Passing) -> Any:
        if self._way is not None:
            return self._way.through(passing)
        evaluation = passing.evaluation
        if self._first_index is None:
            self._first_index = evaluation.index
        skips = self.memory.recall("skips", evaluation)
        computes = self._decide(evaluation, self.criterion.change(passing), skips)
        skips = torch.zeros(evaluation.rows, dtype=torch.int64) if skips is None else skips
        self.memory.keep("skips", torch.where(computes, 0, skips + 1), evaluation)
        self.criterion.keep(evaluation, computes)
        picks = None if bool(computes.all()) else computes.nonzero().flatten()
        self._way = StackPass(self.memory, self.layouts, evaluation, picks)
        return self.criterion.enter(passing, self._way)

    def _decide(self, evaluation: Evaluation, change: Tensor | None, skips: Tensor | None) -> Tensor:
        """Which rows compute, bool (rows,).

        Args:
            evaluation: the evaluation.
            change: how much each row changed; None where there is nothing to compare with.
            skips: how often in a row each was skipped; None where that was not followed.
        """
        leader = self._decisions.get(evaluation.component)
        known = change is not None and skips is not None and StackPass.is_kept(self.memory, self.layouts, evaluation)
        if not known or self._is_due(evaluation):
            samples = torch.ones(1, dtype=torch.bool)
        elif leader is not None and leader.is_for(evaluation):
            samples = leader.computes
        else:
            assert change is not None
            assert skips is not None
            most = math.inf if self.part.max_skips is None else self.part.max_skips
            computes = ~(change < self.part.threshold) | (skips >= most)
            samples = computes.reshape(stacked_branches(evaluation.inputs), -1).any(0)
        if not evaluation.ordinal:
            self._decisions[evaluation.component] = _Decision(evaluation.index, samples)
        return samples.repeat(evaluation.rows // len(samples))

    def _is_due(self, evaluation: Evaluation) -> bool:
        """Whether everything is computed in this step, whatever changed."""
        assert self._first_index is not None
        begun = evaluation.index - self._first_index
        return begun < self.part.warmup or evaluation.index >= len(self.scheduler.timesteps) - self.part.last_steps
