"""Caches during a call: the modules that they watch, what they keep for each branch, and what is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .network import Evaluation, run_module
from .stats import Counter


@dataclass
class Passing:
    """One call of a watched module, while the cache decides about it.

    Attributes:
        name: of the module: component, a dot, and its name in the network.
        module: the module.
        args: its positional arguments.
        kwargs: the others.
        evaluation: the evaluation that runs.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    evaluation: Evaluation
    ran_rows: int = 0

    def run(self) -> Any:
        """What the module gives for its arguments."""
        return self.run_with(self.args, self.kwargs, self.evaluation.rows)

    def run_with(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Any:
        """What the module gives for others.

        Args:
            args: positional arguments.
            kwargs: the others.
            rows: how many rows of the evaluation they hold, for the count.
        """
        self.ran_rows += rows
        return run_module(self.module, args, kwargs)


class CacheHook:
    """What a cache does during one call. Override what it needs; a fresh one is made for each call.

    Attributes:
        modules: the modules whose calls it sees, by name: component, a dot, and the name in the network.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.memory = Memory()

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        """Sees, changes or replaces an evaluation of the network."""
        return proceed(evaluation)

    def pass_module(self, passing: Passing) -> Any:
        """Runs a call of a watched module, or answers from what was kept."""
        return passing.run()

    def held_bytes(self) -> int:
        """Bytes that are kept now."""
        return self.memory.held_bytes()


@dataclass(frozen=True)
class Inside:
    """Listens to the watched modules during one evaluation."""

    watched: Mapping[int, tuple[CacheHook, str]]
    evaluation: Evaluation
    counter: Counter

    def listens_to(self, module: nn.Module) -> bool:
        """Whether a cache watches ``module``."""
        return id(module) in self.watched

    def evaluate(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hands a call to the cache that watches the module, and counts the rows that ran."""
        cache, name = self.watched[id(module)]
        passing = Passing(name, module, args, kwargs, self.evaluation)
        output = cache.pass_module(passing)
        self.counter.module(name, passing.ran_rows, self.evaluation.rows - passing.ran_rows)
        return output


@dataclass(frozen=True)
class _Entry:
    """Tensors of some rows of a batch, and which; ``versions`` tell whether somebody wrote into them since."""

    tree: Any
    tensors: tuple[Tensor, ...]
    kept: tuple[int, ...] | None
    rows: int
    versions: tuple[int, ...]

    def is_sound(self) -> bool:
        """Whether nobody wrote into the tensors since they were kept."""
        return self.versions == tuple(map(_version, self.tensors))


@dataclass
class Memory:
    """What one cache keeps during one call, apart for each network and branch of guidance.

    A tensor that the network writes into after it was kept is not what was kept: it is forgotten, and copied the next
    time.
    """

    entries: dict[tuple[Any, ...], _Entry] = field(default_factory=dict)
    written: set[tuple[Any, ...]] = field(default_factory=set)

    def keep(self, name: str, tree: Any, evaluation: Evaluation) -> None:
        """Keeps tensors until the next time.

        Args:
            name: what they are called.
            tree: a tensor, or tensors in tuples, lists and dictionaries; (rows * k, ...) with the rows of the batch
                slowest.
            evaluation: the evaluation that they come from.
        """
        key = _key(name, evaluation)
        if key in self.written:
            tree = tree_map_only(Tensor, torch.clone, tree)
        tensors = tuple(tensors_in(tree))
        self.entries[key] = _Entry(tree, tensors, evaluation.kept, evaluation.rows, tuple(map(_version, tensors)))

    def recall(self, name: str, evaluation: Evaluation) -> Any:
        """What was kept under ``name`` for the branch and rows of ``evaluation``; None when it was not."""
        key = _key(name, evaluation)
        entry = self.entries.get(key)
        if entry is None:
            return None
        if not entry.is_sound():
            self.written.add(key)
            del self.entries[key]
            return None
        if entry.kept == evaluation.kept and entry.rows == evaluation.rows:
            return entry.tree
        have = entry.kept if entry.kept is not None else tuple(range(entry.rows))
        want = evaluation.kept if evaluation.kept is not None else tuple(range(evaluation.rows))
        if not set(want) <= set(have):
            return None
        picks = torch.tensor([have.index(row) for row in want])
        return tree_map_only(Tensor, lambda tensor: take_rows(tensor, picks, entry.rows), entry.tree)

    def held_bytes(self) -> int:
        """Bytes of what is kept; a storage that several tensors share counts once."""
        storages = {}
        for entry in self.entries.values():
            for tensor in entry.tensors:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


def take_rows(tensor: Tensor, picks: Tensor, rows: int) -> Tensor:
    """Some rows of a tensor (rows * k, ...) whose rows are slowest, (len(picks) * k, ...); others stay as they are.

    Args:
        tensor: the tensor.
        picks: int64 (m,) which rows.
        rows: how many rows it has.
    """
    if tensor.ndim == 0 or len(tensor) % rows:
        return tensor
    grouped = tensor.reshape(rows, -1, *tensor.shape[1:]).index_select(0, picks.to(tensor.device))
    return grouped.flatten(0, 1)


def _key(name: str, evaluation: Evaluation) -> tuple[Any, ...]:
    return (evaluation.component, evaluation.branch, name)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dictionaries and outputs of models, in their order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):  # outputs of diffusers' models too
        for item in tree.values():
            yield from tensors_in(item)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written into; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version
