"""A table of which modules compute at which step, and what runs it: the base of masks, routers and rehashed steps."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .cache import CachePart
from .cache_call import CacheHook, Passing, tensors_in
from .errors import InputError
from .forecast import forecast
from .network import Evaluation
from .part import Run
from .stacks import Streams, block_names, named_arguments, streams_of, sublayers

Target = Literal["block", "attention", "cross-attention", "mlp"]
Table = Sequence[Sequence[bool]]
"For each timestep of the scheduler, whether each module computes; a single entry stands for all modules."


def targets_in(network: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
    """Names of the modules of some kinds: block after block, and within one in the order of ``targets``.

    Raises:
        InputError: when the network has no stack of blocks, or no such module.
    """
    inside = sublayers(network)
    names = tuple(
        name
        for block in block_names(network)
        for target in targets
        for name in ((block,) if target == "block" else inside[target])
        if name == block or name.startswith(f"{block}.")
    )
    if not names:
        raise InputError(f"{type(network).__name__} has no {' or '.join(targets)} in its blocks")
    return names


def is_block(name: str) -> bool:
    """Whether ``name`` is that of a block, which is an element of a list; parts of blocks have names of their own."""
    return name.rpartition(".")[2].isdigit()


class MaskPart(CachePart):
    """A cache that decides by a table, and not by the data."""

    @abstractmethod
    def table(self) -> Table | None:
        """Which modules compute at which step, in the order of `reach`; None while it is in a file."""

    def forecasts(self) -> int:
        """Degree of the polynomial that goes on from the last computed values; 0 reuses the last one."""
        return 0

    def residual(self, name: str) -> bool:
        """Whether of the module called ``name`` the change that it makes to its streams is kept, not its output."""
        return False

    def computes(self, steps: int) -> tuple[bool, ...] | None:
        """Of each step, whether all modules compute.

        Raises:
            InputError: when the table is for another number of steps.
        """
        table = self.table()
        if table is None:
            return None
        check_steps(self.type, len(table), steps)
        return tuple(all(row) for row in table)

    def check_modules(self, network: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
        """The names, if the table has an entry for each.

        Raises:
            InputError: when it has more or fewer.
        """
        width = len((self.table() or ((True,),))[0])
        if width not in (1, len(names)):
            raise InputError(
                f"the {self.type} table is {width} modules wide and {type(network).__name__} has {len(names)} of its "
                f"kinds, from {names[0]} to {names[-1]}"
            )
        return tuple(names)

    def entries(self, modules: Iterable[str]) -> dict[str, tuple[bool, ...]]:
        """Of each module, by component, a dot, and name, whether it computes at each timestep."""
        table = self.table()
        assert table is not None
        return {
            name: tuple(row[column if len(row) > 1 else 0] for row in table)
            for name, column in columns(modules).items()
        }

    def make(self, modules: Mapping[str, nn.Module], run: Run) -> CacheHook:
        """The hook of one call: each network has its modules in the order of the table."""
        computes = self.entries(modules)
        residual = frozenset(name for name in modules if self.residual(name))
        return MaskHook(self.type, modules, computes, run.scheduler, self.forecasts(), residual)


class RowsPart(MaskPart):
    """A cache whose table is written as text."""

    rows: tuple[str, ...] = Field(
        min_length=1,
        description="For each timestep of the scheduler a 1 or 0 for each module, or a single one for all of them.",
    )

    @model_validator(mode="after")
    def _even(self) -> Self:
        what = self.type.replace("-", " ")
        for index, row in enumerate(self.rows):
            if not row or set(row) - {"0", "1"}:
                raise ValueError(f"row {index} of a {what} is made of 0 and 1; got {row!r}")
            if len(row) != len(self.rows[0]):
                raise ValueError(
                    f"row {index} of a {what} has {len(row)} modules and row 0 has {len(self.rows[0])}; give each "
                    "as many"
                )
        return self

    def table(self) -> Table:
        """The rows as truth values."""
        return [[entry == "1" for entry in row] for row in self.rows]


def check_targets(part: str, targets: Sequence[str]) -> None:
    """Refuses a kind of modules that is named twice.

    Raises:
        ValueError: when one is.
    """
    if len(set(targets)) != len(targets):
        raise ValueError(f"the targets of a {part} are different kinds; got {', '.join(targets)}")


def columns(modules: Iterable[str]) -> dict[str, int]:
    """Of each module, by component, a dot, and name, its place among those of its component."""
    seen = Counter[str]()
    found = {}
    for name in modules:
        component = name.partition(".")[0]
        found[name] = seen[component]
        seen[component] += 1
    return found


def check_steps(part: str, made_for: int, steps: int) -> None:
    """Refuses a table for another number of timesteps.

    Raises:
        InputError: when it is.
    """
    if steps != made_for:
        raise InputError(
            f"the {part} table is for {made_for} timesteps and the scheduler has {steps}; sample in as many steps as "
            "it was made for, or make another"
        )


class FeatureHook(CacheHook):
    """What a module is remembered by: its output, or of a block the change that it makes to each stream.

    Args:
        modules: what the cache decides about.
        residual: the names of those whose change is kept.
    """

    def __init__(self, modules: Mapping[str, nn.Module], residual: frozenset[str]) -> None:
        super().__init__(modules)
        self.residual = residual
        self._streams: dict[str, Streams] = {}
        self._shapes = ""
        self._calls = Counter[str]()

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        """Notes the shapes that the network is called with, and counts the calls of each module anew."""
        self._shapes = str([tuple(tensor.shape[1:]) for tensor in tensors_in(evaluation.inputs)])
        self._calls.clear()
        return proceed(evaluation)

    def place(self, passing: Passing) -> str:
        """What a feature is kept under: the module, which of its calls in this evaluation, and the network's shapes."""
        self._calls[passing.name] += 1
        return f"{passing.name} {self._calls[passing.name]} {self._shapes}"

    def feature(self, passing: Passing, output: Any) -> Any:
        """What is kept of an output, tensors in the order of the output.

        Raises:
            InputError: when it cannot be told which stream an output of a block continues.
        """
        if passing.name not in self.residual:
            return output
        self._streams[passing.name] = streams_of(passing.module, passing.args, passing.kwargs, output)
        return _combined(output, self._inputs(passing), -1)

    def answer(self, passing: Passing, feature: Any) -> Any:
        """The output of a call that has a feature, kept or forecast."""
        return _combined(feature, self._inputs(passing), 1) if passing.name in self.residual else feature

    def _inputs(self, passing: Passing) -> dict[int, Tensor]:
        """The streams that come in, by the position of the output that they leave by."""
        named = named_arguments(passing.module, passing.args, passing.kwargs)
        return {position: named[name] for name, position in self._streams[passing.name]}


class MaskHook(FeatureHook):
    """Runs modules or answers for them, by a table.

    Args:
        part: the cache, as the user knows it.
        modules: what it decides about.
        computes: of each module, whether it computes at each timestep of the scheduler.
        scheduler: the attached scheduler.
        order: degree of the polynomial through the last computed values.
        residual: the blocks of which the change of each stream is kept.
    """

    def __init__(
        self,
        part: str,
        modules: Mapping[str, nn.Module],
        computes: Mapping[str, tuple[bool, ...]],
        scheduler: Any,
        order: int = 0,
        residual: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(modules, residual)
        self.part, self.computes, self.scheduler, self.order = part, computes, scheduler, order

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        """Checks the number of timesteps.

        Raises:
            InputError: when the scheduler has not as many as the table.
        """
        check_steps(self.part, len(next(iter(self.computes.values()))), len(self.scheduler.timesteps))
        return super().evaluate(evaluation, proceed)

    def pass_module(self, passing: Passing) -> Any:
        """Runs the module where the table says so or nothing is kept; keeps what a later step will ask for."""
        evaluation, computes = passing.evaluation, self.computes[passing.name]
        place, step = self.place(passing), evaluation.index
        kept = self.memory.recall(place, evaluation)
        if kept is not None and not computes[step]:
            return self.answer(passing, forecast(kept, step))
        output = passing.run()
        if self._wanted(computes, step):
            self._keep(place, self.feature(passing, output), kept, evaluation)
        return output

    def _keep(self, place: str, value: Any, kept: Any, evaluation: Evaluation) -> None:
        """Puts what a step computed before what is kept of the steps that computed last, None where nothing is."""
        step = evaluation.index
        older = [each for each in kept or () if each[0] != step]
        self.memory.keep(place, ((step, value), *older[: self.order]), evaluation)

    def _wanted(self, computes: Sequence[bool], step: int) -> bool:
        """Whether a value of ``step`` is among those that a later step is answered from."""
        skips = [later for later in range(step + 1, len(computes)) if not computes[later]]
        return bool(skips) and sum(computes[step + 1 : skips[0]]) <= self.order


def _combined(tree: Any, inputs: Mapping[int, Tensor], sign: int) -> Any:
    """``tree`` with the streams added or, for a ``sign`` of -1, taken off."""
    if isinstance(tree, Tensor):
        return torch.add(tree, inputs[0], alpha=sign)
    parts = (
        torch.add(value, inputs[index], alpha=sign) if index in inputs else value for index, value in enumerate(tree)
    )
    return type(tree)(parts)
