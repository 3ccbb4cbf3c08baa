"""Whole steps without the blocks of a transformer: its stack is passed by at once, not block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .cache_call import Memory, Passing
from .forecast import forecast
from .mask import MaskHook
from .network import Evaluation
from .stack_pass import Layouts, StackPass


class StackMaskHook(MaskHook):
    """Runs whole steps or answers for them; a stack of blocks adds to its streams what it added as one.

    That is what its blocks would add one by one, as a forecast of a sum is the sum of the forecasts, for the work and
    the memory of a single block.

    Args:
        part: the cache, as the user knows it.
        modules: what it decides about.
        computes: whether each timestep of the scheduler computes.
        scheduler: the attached scheduler.
        order: degree of the polynomial through the last computed values.
        stacked: names of the modules that are blocks of a transformer; the others keep their output.
    """

    def __init__(
        self,
        part: str,
        modules: Mapping[str, nn.Module],
        computes: tuple[bool, ...],
        scheduler: Any,
        order: int,
        stacked: frozenset[str],
    ) -> None:
        super().__init__(part, modules, dict.fromkeys(modules, computes), scheduler, order)
        self.table, self.stacked = computes, stacked
        self.layouts = Layouts(rows_apart=False)
        self._way: StackPass | None = None

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        """Goes the way through the stack that the table says; keeps what a later step will ask for."""

        def run(evaluation: Evaluation) -> Any:
            present = self._present(evaluation)
            if present is not None:
                self._way = StackPass(present, self.layouts, evaluation, torch.empty(0, dtype=torch.int64))
                return proceed(evaluation)
            self._way = None
            if not self._wanted(self.table, evaluation.index):
                return proceed(evaluation)
            added = Memory()
            self._way = way = StackPass(added, self.layouts, evaluation, None)
            output = proceed(evaluation)
            way.finish()
            for name in self.layouts.starts_of(evaluation):
                value = added.recall(name, evaluation)
                if value is not None:
                    place = self._place(name)
                    self._keep(place, value, self.memory.recall(place, evaluation), evaluation)
            return output

        return super().evaluate(evaluation, run)

    def pass_module(self, passing: Passing) -> Any:
        """Goes the way through the stack; decides about a module that is not of one by itself."""
        if passing.name not in self.stacked:
            return super().pass_module(passing)
        return passing.run() if self._way is None else self._way.through(passing)

    def _present(self, evaluation: Evaluation) -> Memory | None:
        """What each segment of the stack adds in this step; None where it computes, or something is not kept."""
        if self.table[evaluation.index]:
            return None
        names = self.layouts.starts_of(evaluation)
        kept = {name: self.memory.recall(self._place(name), evaluation) for name in names}
        if not kept or not all(kept.values()):
            return None
        present = Memory()
        for name, values in kept.items():
            present.keep(name, forecast(values, evaluation.index), evaluation)
        return present

    def _place(self, name: str) -> str:
        return f"{name} {self._shapes}"
