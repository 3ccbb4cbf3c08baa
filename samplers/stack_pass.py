"""The way of a batch through a stack of blocks: some rows run, the others add what the blocks added before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .cache_call import Inside, Memory, Passing
from .errors import InputError
from .network import LISTENER, Evaluation
from .rows import narrowed, pick_rows, put_rows
from .stacks import Streams, named_arguments, streams_of, with_arguments

Features = dict[str, Tensor]
"""The streams of features at one place, by the name of the input that they come in by, (rows * k, ...) each."""


@dataclass(frozen=True)
class Layout:
    """What goes in and out of a block.

    Attributes:
        streams: which outputs continue which inputs.
        size: of the tuple that the block returns; None where it returns a tensor.
    """

    streams: Streams
    size: int | None

    def incoming(self, arguments: dict[str, Any]) -> Features:
        """The streams among the arguments of a call."""
        return {name: arguments[name] for name, _ in self.streams}

    def outgoing(self, output: Any) -> Features:
        """The streams in what the block returned."""
        return {name: output if self.size is None else output[position] for name, position in self.streams}

    def output(self, streams: Features) -> Any:
        """What the block would return for these streams."""
        if self.size is None:
            return streams[self.streams[0][0]]
        places = {position: streams[name] for name, position in self.streams}
        return tuple(places.get(position) for position in range(self.size))


@dataclass
class Layouts:
    """What was learnt of the blocks while they ran.

    Attributes:
        known: layouts by block.
        starts: of each network and branch, the blocks that follow no other: what came before them was changed on the
            way, joined, permuted or added to.
        written: blocks whose output the network writes into afterwards.
        rows_apart: whether the rows of a batch are decided about one by one, and so have to be told apart.
    """

    known: dict[str, Layout] = field(default_factory=dict)
    starts: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)
    rows_apart: bool = True

    def learn(self, passing: Passing, output: Any) -> Layout:
        """The layout of a block that ran.

        Raises:
            InputError: when its streams cannot be told, or the samples in them cannot be told apart.
        """
        if passing.name not in self.known:
            streams = streams_of(passing.module, passing.args, passing.kwargs, output)
            layout = Layout(streams, None if isinstance(output, Tensor) else len(output))
            rows = passing.evaluation.rows
            for tensor in layout.outgoing(output).values() if self.rows_apart else ():
                if len(tensor) % rows or (tensor.ndim < 3 and len(tensor) != rows):
                    raise InputError(
                        f"{type(passing.module).__name__} gives {tuple(tensor.shape)} for {rows} samples: it packs "
                        "them into one sequence, in which none can be left out; call the pipeline for one at a time"
                    )
            self.known[passing.name] = layout
        return self.known[passing.name]

    def starts_of(self, evaluation: Evaluation) -> list[str]:
        """The blocks that follow no other, in the network and branch of an evaluation."""
        return self.starts.setdefault((evaluation.component, evaluation.branch), [])


@dataclass
class _Segment:
    """Blocks that hand their streams to each other untouched.

    Attributes:
        name: of the first.
        incoming: what came into it.
        last: name of the last block so far.
        outgoing: what it gave.
        versions: of that, when it was given.
    """

    name: str
    incoming: Features
    last: str = ""
    outgoing: Features = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)

    def end(self, last: str, outgoing: Features) -> None:
        self.last, self.outgoing, self.versions = last, outgoing, _versions(outgoing)

    def is_followed_by(self, incoming: Features) -> bool:
        return all(tensor is self.outgoing.get(name) for name, tensor in incoming.items()) and not self.is_written

    @property
    def is_written(self) -> bool:
        return _versions(self.outgoing) != self.versions


class StackPass:
    """One evaluation's way through the blocks of a network.

    The rows that run are gathered before each block and put back after it, so that between the blocks there are always
    all rows. Blocks that hand their streams to each other untouched are one segment: of each stream, what the segment
    added is kept, and the rows that do not run add it where the segment starts. What the network itself adds between
    the blocks (a ControlNet's features) is never kept: the segment ends there.

    Args:
        memory: where it is kept.
        layouts: what is known of the blocks.
        evaluation: the evaluation.
        picks: int64 (m,) the rows that run; None for all of them.
    """

    def __init__(self, memory: Memory, layouts: Layouts, evaluation: Evaluation, picks: Tensor | None) -> None:
        self.memory, self.layouts, self.evaluation, self.picks = memory, layouts, evaluation, picks
        self.rows = evaluation.rows
        self._segment: _Segment | None = None
        self._seen: set[str] = set()
        self._picked: dict[int, tuple[Any, Any]] = {}
        self._latest: dict[int, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def is_kept(memory: Memory, layouts: Layouts, evaluation: Evaluation) -> bool:
        """Whether every segment's addition is there for the rows of an evaluation."""
        starts = layouts.starts_of(evaluation)
        return bool(starts) and all(memory.recall(name, evaluation) is not None for name in starts)

    def through(self, passing: Passing) -> Any:
        """What a block gives: run, for the rows that run.

        Raises:
            InputError: when the block is no residual block.
        """
        if passing.name in self._seen:
            raise InputError(f"{passing.name} runs twice in one evaluation; this cache cannot tell the two apart")
        self._seen.add(passing.name)
        layout = self.layouts.known.get(passing.name)
        if self.picks is None or layout is None:
            return self._run_all(passing)
        incoming = layout.incoming(named_arguments(passing.module, passing.args, passing.kwargs))
        added = self.memory.recall(passing.name, self.evaluation) or {}
        whole = {name: tensor + added[name] if name in added else tensor for name, tensor in incoming.items()}
        if not len(self.picks):
            return layout.output(whole)
        part = layout.outgoing(self._run_picked(passing, layout))
        outgoing = {name: put_rows(whole[name], part[name], self.picks, self.rows) for name in part}
        self._latest = {id(outgoing[name]): (outgoing[name], part[name]) for name in part}
        self._follow(passing.name, incoming, outgoing)
        return layout.output(outgoing)

    def finish(self) -> None:
        """Keeps what the last segment added."""
        if self._segment is not None:
            self._close(self._segment)
            self._segment = None

    def _run_all(self, passing: Passing) -> Any:
        arguments = named_arguments(passing.module, passing.args, passing.kwargs)
        versions = _versions(arguments)
        output = passing.run()
        layout = self.layouts.learn(passing, output)
        if _versions(arguments) != versions:
            raise InputError(f"{type(passing.module).__name__} writes into its inputs; what it adds cannot be told")
        self._follow(passing.name, layout.incoming(arguments), layout.outgoing(output))
        return output

    def _run_picked(self, passing: Passing, layout: Layout) -> Any:
        assert self.picks is not None
        arguments = named_arguments(passing.module, passing.args, passing.kwargs)
        streams = {name for name, _ in layout.streams}
        picked = {name: self._pick(name, value, name in streams) for name, value in arguments.items()}
        args, kwargs = with_arguments(passing.module, passing.args, passing.kwargs, picked)
        with self._listening_to_picks():
            return passing.run_with(args, kwargs, len(self.picks))

    def _pick(self, name: str, value: Any, stream: bool) -> Any:
        """The rows of an argument that run; what all blocks are given is gathered once."""
        assert self.picks is not None
        if stream:
            if id(value) in self._latest and self._segment is not None and not self._segment.is_written:
                return self._latest[id(value)][1]
            return pick_rows(name, value, self.picks, self.rows)
        if id(value) not in self._picked:
            self._picked[id(value)] = (value, pick_rows(name, value, self.picks, self.rows))
        return self._picked[id(value)][1]

    @cached_property
    def _inside(self) -> Evaluation:
        assert self.picks is not None
        return narrowed(self.evaluation, self.picks)

    @contextmanager
    def _listening_to_picks(self) -> Iterator[None]:
        """Tells the caches of modules in a block that it runs fewer rows."""
        listener = LISTENER.get()
        if not isinstance(listener, Inside):
            yield
            return
        token = LISTENER.set(replace(listener, evaluation=self._inside))
        try:
            yield
        finally:
            LISTENER.reset(token)

    def _follow(self, name: str, incoming: Features, outgoing: Features) -> None:
        """Goes on with the segment, or ends it and starts another."""
        starts = self.layouts.starts_of(self.evaluation)
        if self._segment is not None and (name in starts or not self._segment.is_followed_by(incoming)):
            self.finish()
        if self._segment is None:
            self._segment = _Segment(name, incoming)
            if name not in starts:
                starts.append(name)
        self._segment.end(name, outgoing)
        if name in self.layouts.written:
            self.finish()

    def _close(self, segment: _Segment) -> None:
        """Keeps what a segment added; nothing, the first time that the network wrote into what it gave."""
        if segment.is_written:
            self.layouts.written.add(segment.last)
            self.memory.keep(segment.name, None, self.evaluation)
            return
        pairs = {name: (segment.incoming[name], out) for name, out in segment.outgoing.items()}
        if self.picks is None:
            added = {name: out - into for name, (into, out) in pairs.items()}
        else:
            kept = self.memory.recall(segment.name, self.evaluation) or {}
            added = {name: self._added(into, out, kept.get(name)) for name, (into, out) in pairs.items()}
        self.memory.keep(segment.name, added, self.evaluation)

    def _added(self, into: Tensor, out: Tensor, kept: Tensor | None) -> Tensor:
        """What was added to the rows that ran, among what is kept for the others: nothing, where they had no start."""
        assert self.picks is not None
        kept = torch.zeros_like(out) if kept is None else kept
        part = pick_rows("", out, self.picks, self.rows) - pick_rows("", into, self.picks, self.rows)
        return put_rows(kept, part, self.picks, self.rows)


def _versions(tensors: dict[str, Any]) -> dict[str, int]:
    """How often each tensor was written into; inference tensors do not count."""
    return {
        name: tensor._version
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and not tensor.is_inference()
    }
