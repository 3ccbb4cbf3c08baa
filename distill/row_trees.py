"""Arguments of a network as trees of which some leaves have one entry a sample: cut, joined, and written to files.

A tree is a tensor, or anything in lists, tuples and dictionaries. A leaf is named by its path, such as
``added_cond_kwargs/time_ids``; the leaves that have rows are a set of paths.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..samplers.cache_call import take_rows
from ..samplers.errors import InputError
from ..samplers.rows import NOT_BATCHED

_POSITIONS = (*NOT_BATCHED, "visual_rope_pos", "text_rope_pos")
"Inputs whose first dimension is a sequence, whatever its length."


def mapped(tree: Any, change: Callable[[str, Any], Any], rowed: Collection[str], path: str = "") -> Any:
    """A tree with each leaf changed.

    Args:
        tree: the tree.
        change: from the path and the value of a leaf to its new value.
        rowed: paths of the leaves that have rows; a list among them is one leaf.
        path: where ``tree`` is.
    """
    if path in rowed:
        return change(path, tree)
    if isinstance(tree, Mapping):
        return {key: mapped(item, change, rowed, _below(path, key)) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(item, change, rowed, _below(path, index)) for index, item in enumerate(tree))
    return change(path, tree)


def leaves(tree: Any, rowed: Collection[str]) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    found: dict[str, Any] = {}

    def keep(path: str, value: Any) -> Any:
        found[path] = value
        return value

    mapped(tree, keep, rowed)
    return found


def paths_with_rows(inputs: Mapping[str, Any], rows: int, listed: bool) -> frozenset[str]:
    """The leaves of a network's inputs that have one entry, or several, for each row of the batch.

    A tensor has them where its length is that of the batch, or, from three dimensions on (frames that a pipeline folds
    into the batch), a multiple of it; positions of a sequence only where a dimension for them comes first. A list has
    them where its length is that of the batch and it holds no tensors.

    Args:
        inputs: by name.
        rows: of the batch.
        listed: whether the network takes its samples as a list, and then its conditions too.
    """
    found: set[str] = set()

    def look(name: str, value: Any, path: str) -> None:
        if isinstance(value, Tensor):
            whole = value.ndim > 0 and len(value) == rows
            folded = value.ndim > 2 and len(value) % rows == 0
            if (whole or folded) and (name not in _POSITIONS or (whole and value.ndim > 2)):
                found.add(path)
        elif isinstance(value, list) and len(value) == rows and (listed or not _has_tensors(value)):
            found.add(path)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                look(name if name in _POSITIONS else key, item, _below(path, key))
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                look(name, item, _below(path, index))

    look("", inputs, "")
    return frozenset(found)


def picked(tree: Any, rowed: Collection[str], picks: Tensor, rows: int) -> Any:
    """A tree with some of its rows, copied; what has none is kept as it is.

    Args:
        tree: the tree.
        rowed: paths of the leaves that have rows.
        picks: int64 (m,) which rows.
        rows: how many there are.
    """

    def pick(path: str, value: Any) -> Any:
        if path not in rowed:
            return value
        return take_rows(value, picks, rows) if isinstance(value, Tensor) else [value[row] for row in picks.tolist()]

    return mapped(tree, pick, rowed)


def joined(trees: Sequence[Any], rowed: Collection[str]) -> Any:
    """Trees of the same form, one below the other.

    Args:
        trees: at least one.
        rowed: paths of the leaves that have rows, the same in all.

    Raises:
        InputError: when their forms differ, or what has no rows does.
    """
    flat = [leaves(tree, rowed) for tree in trees]
    for other in flat[1:]:
        if other.keys() != flat[0].keys():
            name = sorted(other.keys() ^ flat[0].keys())[0]
            raise InputError(f"conditions can be joined where they have the same inputs; {name} is not in all of them")

    def join(path: str, value: Any) -> Any:
        values = [leaf[path] for leaf in flat]
        if path not in rowed:
            if not all(same(value, other) for other in values[1:]):
                raise InputError(f"conditions can be joined where they share {path}; encode them at one size")
            return value
        if not isinstance(value, Tensor):
            return [item for part in values for item in part]
        shapes = sorted({tuple(part.shape[1:]) for part in values})
        if len(shapes) > 1:
            raise InputError(
                f"conditions can be joined where their shapes agree; {path} has {shapes[0]} and {shapes[1]} for one "
                "sample; encode them at one size and with texts padded to one length"
            )
        return torch.cat(values)

    return mapped(trees[0], join, rowed)


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal to the last number."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def to_json(tree: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """A tree as JSON; its tensors are put into ``tensors``, named by their paths.

    Raises:
        InputError: when a leaf is neither a tensor nor a number, a text, a truth value or None.
    """
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().cpu().clone()
        return {"tensor": path}
    if isinstance(tree, Mapping):
        return {"dict": {key: to_json(item, tensors, _below(path, key)) for key, item in tree.items()}}
    if isinstance(tree, list | tuple):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [to_json(item, tensors, _below(path, index)) for index, item in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise InputError(f"{path} is a {type(tree).__name__}, which cannot be written to a file; leave the argument out")


def from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `to_json` wrote.

    Raises:
        KeyError: when a tensor is missing.
    """
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: from_json(item, tensors) for key, item in content.items()}
    items = [from_json(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _has_tensors(tree: Any) -> bool:
    if isinstance(tree, Mapping):
        return any(map(_has_tensors, tree.values()))
    return isinstance(tree, Tensor) or (isinstance(tree, list | tuple) and any(map(_has_tensors, tree)))


def _below(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)
