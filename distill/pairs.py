"""Pairs that a teacher makes: the noise that it began with, and the samples that it reached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from ..samplers import Plan
from ..samplers.call import CallHook, Step
from ..samplers.errors import InputError
from ..samplers.files import write_tensors
from ..samplers.fingerprint import fingerprint
from ..samplers.network import denoisers
from ..samplers.recording import record
from ..samplers.start import unit_noise
from .encoder import Encoder, Value
from .export import call_arguments
from .open_files import OPEN, undamaged
from .rollout import started

SHARD = 256
"Pairs in a file."


class Pair(NamedTuple):
    """Some pairs, float32 (B, ...): what a student begins with, and the clean samples that a teacher made of it.

    The teacher's plan may begin later, or from something else that follows from the noise.
    """

    start: Tensor
    x0: Tensor


class Pairs:
    """Pairs of one teacher and plan, by number. Pair i has the seed ``seed + i`` and the value i mod their number.

    On disk a pair takes ``pair_bytes``; a file holds 256.

    Args:
        encoder: of the pipeline; its arguments go into the teacher's call.
        plan: how the teacher samples, guidance included.
        values: prompts or labels; (None,) for a pipeline that takes neither.
        folder: of the files.
        count: number of pairs.
        seed: of the first one.
        coupled: whether samples must follow from their noise; not where they are wanted as data alone.

    Raises:
        InputError: when the pipeline does not take values of this sort.
    """

    def __init__(
        self,
        encoder: Encoder,
        plan: Plan,
        values: Sequence[Value],
        folder: Path,
        count: int,
        seed: int = 0,
        *,
        coupled: bool = True,
    ) -> None:
        if count < 1 or not values:
            raise InputError(f"got {count} pairs of {len(values)} prompts or labels; give at least one of each")
        encoder.check(values)
        self.encoder, self.plan, self.values, self.folder = encoder, plan, tuple(values), folder
        self.count, self.seed, self.coupled = count, seed, coupled
        self._made_by = self._config()
        self._open = lru_cache(OPEN)(self._read)  # a batch takes its rows from many files

    def __len__(self) -> int:
        return self.count

    @property
    def pair_bytes(self) -> int:
        """Bytes on disk for one pair."""
        return 2 * 4 * int(np.prod(self.encoder.layout.shape))

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk for all of them."""
        return self.count * self.pair_bytes

    def value(self, item: int) -> Value:
        """The prompt or label of a pair."""
        return self.values[item % len(self.values)]

    def make(
        self, batch_size: int = 8, rank: int = 0, world: int = 1, progress: Callable[[int], None] = lambda count: None
    ) -> None:
        """Samples what is missing. An interrupted run goes on at the file at which it stopped; a larger count fills up.

        Args:
            batch_size: samples per call of the pipeline.
            rank: number of this process.
            world: number of processes.
            progress: called with the number of pairs after each call.

        Raises:
            InputError: as `fewstep.samplers.attach`, when a sample is NaN, or does not follow from its noise where it
                must, or a file cannot be written.
        """
        for shard in range(-(-self.count // SHARD))[rank::world]:
            items = range(shard * SHARD, min(self.count, (shard + 1) * SHARD))
            if self._path(shard).is_file() and len(self._row(shard, ...).x0) >= len(items):
                continue
            made: list[Pair] = []
            for first in range(0, len(items), batch_size):
                some = items[first : first + batch_size]
                made.append(self._sample(some))
                progress(len(some))
            tensors = {name: torch.cat([getattr(pair, name) for pair in made]) for name in Pair._fields}
            write_tensors(self._path(shard), tensors, {"made_by": self._header(shard)})
            self._open.cache_clear()

    def get(self, items: Sequence[int]) -> Pair:
        """Some of the pairs.

        Raises:
            InputError: when they are not made yet, or a file is damaged or foreign.
        """
        rows = [self._row(*divmod(item, SHARD)) for item in items]
        return Pair(torch.stack([row.start for row in rows]), torch.stack([row.x0 for row in rows]))

    def _sample(self, items: Sequence[int]) -> Pair:
        arguments = call_arguments(self.plan, self.encoder.arguments([self.value(item) for item in items]))
        generators = [torch.Generator("cpu").manual_seed(self.seed + item) for item in items]
        watch = _Ends(generators)
        arguments |= {"generator": generators, "output_type": "np"}
        stats = record(self.encoder.pipe, self.plan, arguments, watch, with_start=True)
        if stats.work or watch.passes > 1:
            raise InputError(
                "the teacher's plan runs a batch in several passes, as adaptive-steps and escalate do: it cannot be "
                "told which sample came from which noise; give --teacher a plan without these"
            )
        if self.coupled and watch.drew_noise():
            raise InputError(
                f"the teacher draws noise in its steps ({watch.solver}): its samples do not follow from the noise that "
                "they began with; give --teacher a plan of a deterministic solver"
            )
        ends = Pair(*(rows[: len(items)].float().cpu() for rows in (watch.start, watch.end)))
        if not ends.x0.isfinite().all():
            raise InputError(f"the teacher makes NaN or infinity of one of the seeds from {self.seed + items[0]} on")
        return ends

    def _row(self, shard: int, row: int | EllipsisType) -> Pair:
        """One pair of a file, or all of them.

        Raises:
            InputError: when it is missing, damaged or foreign.
        """
        opened = self._open(shard)
        with undamaged(self._path(shard)):
            return Pair(*(opened[name][row] for name in Pair._fields))

    def _read(self, shard: int) -> dict[str, Any]:
        path = self._path(shard)
        if not path.is_file():
            raise InputError(f"{path} does not exist; make the pairs first")
        with undamaged(path):
            stream: Any = safetensors.safe_open(path, "pt")
            if (stream.metadata() or {}).get("made_by") != self._header(shard):
                raise InputError(f"{path} was made by another teacher, plan or seed; delete it and make it again")
            return {name: stream.get_slice(name) for name in Pair._fields}

    def _path(self, shard: int) -> Path:
        return self.folder / f"pairs-{shard:05d}.safetensors"

    def _header(self, shard: int) -> str:
        return f"{self._made_by}-{shard}"

    def _config(self) -> str:
        """What decides about the pairs, as a hash."""
        networks = {name: fingerprint(network) for name, network in denoisers(self.encoder.pipe).items()}
        known = [
            networks,
            self.plan.model_dump(mode="json"),
            self.plan.file_digests(),
            self.encoder.call_kwargs,
            self.encoder.kind,
            self.values,
            self.seed,
            self.coupled,
        ]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


class _Ends(CallHook):
    """Keeps the pipeline's noise, and the state after the last step.

    Args:
        generators: of the call.
    """

    start: Tensor
    end: Tensor
    solver: str

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators
        self.states: list[Tensor] = []
        self.passes = 0

    def before_step(self, step: Step) -> None:
        self.passes += step.index == 0
        if not self.states:
            unit = unit_noise(step.scheduler, step.process, step.time, step.x.device)
            self.start = started(step.process, step.x / unit)
            self.solver = type(step.scheduler).__name__
            self.states = self._states()

    def after_step(self, step: Step) -> None:
        assert step.x_next is not None
        self.end = step.x_next

    def drew_noise(self) -> bool:
        """Whether a step did."""
        return not all(map(torch.equal, self.states, self._states()))

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]
