"""How a gate tells, before most of a network runs, how much a sample has changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .cache_call import Memory, Passing
from .errors import InputError
from .network import Evaluation, listening
from .rows import pick_rows, put_rows
from .stack_pass import Layouts, StackPass
from .stacks import attention_of, named_arguments


class Criterion(ABC):
    """A sign that the blocks would add something else than before. It meets the first block of each evaluation.

    Args:
        memory: of the gate.
        layouts: what is known of the blocks.
        coefficients: of a polynomial that rescales changes, highest power first; None leaves them.
    """

    always: ClassVar[int]
    "How many blocks run in any case."

    def __init__(self, memory: Memory, layouts: Layouts, coefficients: Sequence[float] | None) -> None:
        self.memory, self.layouts, self.coefficients = memory, layouts, coefficients

    @abstractmethod
    def change(self, passing: Passing) -> Tensor | None:
        """How much each row has changed, float64 (rows,), on the CPU; None where it cannot be compared."""

    @abstractmethod
    def keep(self, evaluation: Evaluation, computes: Tensor) -> None:
        """Keeps what the next evaluations are compared with.

        Args:
            evaluation: that of the last `change`.
            computes: bool (rows,) which rows are computed in it.
        """

    @abstractmethod
    def enter(self, passing: Passing, way: StackPass) -> Any:
        """What the first block gives; the rest of the blocks goes the way."""


class FirstBlock(Criterion):
    """Compares what the first block adds with what it added when the others were last computed."""

    always = 1

    def __init__(self, memory: Memory, layouts: Layouts, coefficients: Sequence[float] | None) -> None:
        super().__init__(memory, layouts, coefficients)
        self._output: Any = None
        self._added = torch.empty(0)

    def change(self, passing: Passing) -> Tensor | None:
        """Runs the block, all rows."""
        self._output = passing.run()
        layout = self.layouts.learn(passing, self._output)
        incoming = layout.incoming(named_arguments(passing.module, passing.args, passing.kwargs))
        name = "hidden_states" if "hidden_states" in incoming else next(iter(incoming))
        self._added = layout.outgoing(self._output)[name] - incoming[name]
        return _relative(self._added, self.memory.recall("first block", passing.evaluation), passing.evaluation.rows)

    def keep(self, evaluation: Evaluation, computes: Tensor) -> None:
        added, kept = self._added, self.memory.recall("first block", evaluation)
        if not computes.any():
            return
        if not computes.all():
            picks = computes.nonzero().flatten()
            part = pick_rows("", added, picks, evaluation.rows)
            added = put_rows(kept, part, picks, evaluation.rows)
        self.memory.keep("first block", added, evaluation)

    def enter(self, passing: Passing, way: StackPass) -> Any:
        return self._output


class ModulatedInput(Criterion):
    """Compares what the first block shows its attention with the same one step before, and sums the changes up."""

    always = 0

    def __init__(self, memory: Memory, layouts: Layouts, coefficients: Sequence[float] | None) -> None:
        super().__init__(memory, layouts, coefficients)
        self._sums: Tensor | None = None
        self._last: dict[tuple[str, int], int] = {}

    def change(self, passing: Passing) -> Tensor | None:
        """Runs the block up to its attention, all rows."""
        evaluation = passing.evaluation
        modulated = _shown_to_attention(passing)
        key = (evaluation.component, evaluation.branch)
        followed = self._last.get(key) == evaluation.index - 1
        self._last[key] = evaluation.index
        before = self.memory.recall("modulated", evaluation) if followed else None
        self.memory.keep("modulated", modulated, evaluation)
        change = _relative(modulated, before, evaluation.rows)
        sums = self.memory.recall("sums", evaluation)
        self._sums = None if change is None or sums is None else sums + self._rescaled(change)
        return self._sums

    def keep(self, evaluation: Evaluation, computes: Tensor) -> None:
        sums = torch.zeros(evaluation.rows, dtype=torch.float64) if self._sums is None else self._sums
        self.memory.keep("sums", sums.masked_fill(computes, 0.0), evaluation)

    def enter(self, passing: Passing, way: StackPass) -> Any:
        return way.through(passing)

    def _rescaled(self, change: Tensor) -> Tensor:
        """The polynomial of a change (arXiv:2411.19108, Eq. 6), by Horner's rule."""
        if self.coefficients is None:
            return change
        value = torch.zeros_like(change)
        for coefficient in self.coefficients:
            value = value * change + coefficient
        return value


CRITERIA: dict[str, type[Criterion]] = {"first-block": FirstBlock, "modulated-input": ModulatedInput}


class _Reached(Exception):
    """The attention was called: nothing behind it needs to run."""

    def __init__(self, shown: Tensor) -> None:
        self.shown = shown


@dataclass(frozen=True)
class _Probe:
    """Listens to an attention, and goes no further."""

    attention: nn.Module

    def listens_to(self, module: nn.Module) -> bool:
        return module is self.attention

    def evaluate(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = named_arguments(module, args, kwargs)
        first = next((value for value in arguments.values() if isinstance(value, Tensor)), None)
        shown = arguments.get("hidden_states", first)
        if not isinstance(shown, Tensor):
            raise InputError(f"{type(module).__name__} is shown no tensor; take the criterion 'first-block'")
        raise _Reached(shown)


def _shown_to_attention(passing: Passing) -> Tensor:
    """What a block would show its first attention: its input, after norm and modulation, (rows * k, ...).

    Raises:
        InputError: when it has no attention, or does not call it.
    """
    attention = passing.module.get_submodule(attention_of(passing.module))
    try:
        with listening((attention,), _Probe(attention)):
            passing.module.forward(*passing.args, **passing.kwargs)
    except _Reached as reached:
        return reached.shown
    raise InputError(f"{passing.name} does not call its attention; take the criterion 'first-block'")


def _relative(new: Tensor, old: Tensor | None, rows: int) -> Tensor | None:
    """mean|new - old| / mean|old| of each row, float64 (rows,) on the CPU; None where there is no like one."""
    if old is None or old.shape != new.shape:
        return None
    change = (new - old).abs().reshape(rows, -1).mean(1, dtype=torch.float32)
    size = old.abs().reshape(rows, -1).mean(1, dtype=torch.float32)
    return (change / size).double().cpu()
