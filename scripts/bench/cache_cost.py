"""What a call with a cache costs beside one without: floating-point operations, bytes and time, of the denoiser."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch.utils.flop_counter import FlopCounterMode

from fewstep.samplers import Plan, attach, denoisers
from fewstep.samplers.attach import Attachment

from .peers import PEERS, Held, bytes_of

Call = Callable[[], Any]
"Calls the pipeline."


@dataclass(frozen=True)
class Trial:
    """What runs on a pipeline: a plan, and under it a cache of another package by name and settings, or none."""

    plan: Plan
    peer: tuple[str, dict[str, Any]] | None = None

    def installed(self, pipe: Any) -> AbstractContextManager[Held]:
        """The other package's cache on the pipeline."""
        if self.peer is None:
            return nullcontext(tuple)
        name, settings = self.peer
        return PEERS[name](pipe, **settings)

    @contextmanager
    def running(self, pipe: Any) -> Iterator[tuple[Attachment, Held]]:
        """Both on the pipeline: the handle of the plan, and what tells what the other package's cache holds."""
        with self.installed(pipe) as held, attach(pipe, self.plan) as handle:
            yield handle, held


@contextmanager
def no_decoding(pipe: Any) -> Iterator[None]:
    """Without the decoder of latents, which is the same in all calls."""
    vae = pipe.components.get("vae")
    if vae is None:
        yield
        return
    size = pipe.transformer.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (vae.config.out_channels, size, size)
    vae.decode = lambda latents: DecoderOutput(sample=torch.zeros(len(latents), *shape))
    try:
        yield
    finally:
        del vae.decode


def counted(pipe: Any, trial: Trial, call: Call) -> tuple[int, int]:
    """Floating-point operations of a call, and the most bytes that the cache held at once."""
    most = 0
    network = next(iter(denoisers(pipe).values()))
    with no_decoding(pipe), trial.running(pipe) as (handle, held):

        def note(*_: Any) -> None:
            nonlocal most
            most = max(most, bytes_of(held()))

        watch = network.register_forward_hook(note)
        try:
            with FlopCounterMode(display=False) as counter:
                call()
        finally:
            watch.remove()
        stats = handle.stats
        assert stats is not None
        return counter.get_total_flops(), max(most, stats.cache_bytes)


def timed(
    pipe: Any, base: Trial, trials: Mapping[str, Trial], call: Call, repeats: int, warm_ups: int = 1
) -> dict[str, dict[str, Any]]:
    """How many times faster than ``base`` each of the others is, all called in turn.

    Args:
        pipe: the pipeline.
        base: what they are compared with.
        trials: by name.
        call: calls the pipeline.
        repeats: rounds that count, at least 2.
        warm_ups: rounds before them.
    """
    rounds = []
    for _ in range(warm_ups + repeats):
        with no_decoding(pipe):
            first = _seconds(pipe, base, call)
            rounds.append({name: (first, _seconds(pipe, trial, call)) for name, trial in trials.items()})
    return {name: _speed_up([found[name] for found in rounds[warm_ups:]]) for name in trials}


def _seconds(pipe: Any, trial: Trial, call: Call) -> tuple[float, float]:
    """Of one call: seconds on the wall, and of this thread on the processor."""
    with trial.running(pipe):
        wall, thread = time.perf_counter(), time.thread_time()
        call()
        return time.perf_counter() - wall, time.thread_time() - thread


def _speed_up(pairs: Sequence[tuple[tuple[float, float], tuple[float, float]]]) -> dict[str, Any]:
    found: dict[str, Any] = {"repeats": len(pairs)}
    for index, clock in enumerate(("wall", "processor")):
        ratios = [base[index] / other[index] for base, other in pairs]
        low, median, high = statistics.quantiles(ratios, n=4)
        found[clock] = {"ratio": median, "quartiles": [low, high]}
    return found
