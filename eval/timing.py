"""How long a configuration takes and how much memory it needs, measured on the object that made its images.

The protocol: first call apart; warm-ups at the same shape, steps and guidance; repeats that are synchronised
at both ends and all kept; batch-1 latency and throughput at a batch size as two numbers that are never derived
from each other; the shares of the components by stamps at their boundaries; memory after the warm-up.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .assets import component_modules
from .conditions import Conditions
from .generate import call_pipeline
from .shares import Shares, component_shares

WARMUPS = 1
"Full calls after the first one, before anything is measured."

THROUGHPUT_REPEATS = 3


@dataclass(frozen=True)
class Spread:
    """Repeats of one measurement, in seconds.

    Attributes:
        values: in the order in which they were measured.
        median: of the values.
        q1: first quartile.
        q3: third quartile.
    """

    values: tuple[float, ...]
    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of some repeats, one at least."""
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(tuple(values), median, q1, q3)


@dataclass(frozen=True)
class Throughput:
    """Images, or answers, per second at a batch size, from the median of the repeats."""

    batch: int
    images_per_s: float
    values_s: tuple[float, ...]


@dataclass(frozen=True)
class Timing:
    """Speed and memory of one configuration.

    Attributes:
        first_call_s: the first call of this configuration in this process, one image.
        latency_s: seconds of a call with one image.
        throughput: at the batch size.
        shares_s: the components of one call with one image.
        flops: floating-point operations of one call with one image, two per multiply-add; None if not counted.
        peak_bytes: most memory in use during the latency repeats.
        peak_kind: ``cuda_allocated`` (`torch.cuda.max_memory_allocated`, weights included), ``rss`` (peak resident
            set of the process in these repeats) or ``rss_of_process`` (its peak since the process started).
        weights_bytes: parameters and buffers of all components.
        warmups: full calls before the repeats.
    """

    first_call_s: float
    latency_s: Spread
    throughput: Throughput
    shares_s: Shares
    flops: int | None
    peak_bytes: int
    peak_kind: str
    weights_bytes: int
    warmups: int
    warnings: tuple[str, ...] = ()


def measure(
    pipe: Any,
    conditions: Conditions,
    call_kwargs: Mapping[str, Any],
    *,
    first_seed: int,
    batch_size: int,
    repeats: int,
) -> Timing:
    """Times a pipeline as it is, with its plan attached.

    Args:
        pipe: the pipeline.
        conditions: what the images show.
        call_kwargs: further arguments of the call.
        first_seed: seed of the first image.
        batch_size: of the throughput.
        repeats: calls behind the latency.
    """

    def call(batch: int) -> Callable[[], None]:
        seeds = range(first_seed, first_seed + batch)
        return lambda: call_pipeline(pipe, conditions, seeds, call_kwargs)

    one = call(1)
    return measure_calls(
        itertools.repeat(one, repeats),
        call(batch_size),
        batch_size=batch_size,
        device=pipe.device,
        shares_of=lambda single, expected_s: component_shares(pipe, single, expected_s),
        weights_bytes=weights_bytes(pipe),
    )


def measure_calls(
    singles: Iterable[Callable[[], None]],
    many: Callable[[], None],
    *,
    batch_size: int,
    device: torch.device,
    shares_of: Callable[[Callable[[], None], float], tuple[Shares, tuple[str, ...]]],
    weights_bytes: int,
    patience_s: float = math.inf,
) -> Timing:
    """The protocol, of any calls.

    Args:
        singles: the calls behind the latency, each of one sample; the first of them is also the one that is not
            counted, and the one that is split into shares and counted in operations.
        many: a call of ``batch_size`` samples.
        batch_size: of the throughput.
        device: where the calls run.
        shares_of: splits a call that takes about so many seconds.
        weights_bytes: see `Timing`.
        patience_s: where the first call of a whole batch takes longer, it is the only one and it counts.
    """
    singles = list(singles)
    one = singles[0]
    first_call_s = timed(one, device)
    for _ in range(WARMUPS):
        one()
    memory = PeakMemory(device)
    latency = Spread.of([timed(single, device) for single in singles])
    peak_bytes = memory.read()
    shares, warnings = shares_of(one, latency.median)
    first_batch_s = timed(many, device)
    again = 0 if first_batch_s > patience_s else min(len(singles), THROUGHPUT_REPEATS)
    batches = [timed(many, device) for _ in range(again)] or [first_batch_s]
    return Timing(
        first_call_s=first_call_s,
        latency_s=latency,
        throughput=Throughput(batch_size, batch_size / statistics.median(batches), tuple(batches)),
        shares_s=shares,
        flops=count_flops(one),
        peak_bytes=peak_bytes,
        peak_kind=memory.kind,
        weights_bytes=weights_bytes,
        warmups=WARMUPS,
        warnings=warnings,
    )


def synchronise(device: torch.device) -> None:
    """Waits for all work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def count_flops(call: Callable[[], None]) -> int | None:
    """Floating-point operations of a call; None when the counter sees none (kernels without a formula)."""
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops() or None


def weights_bytes(pipe: Any) -> int:
    """Bytes of the parameters and buffers of all components, shared ones once."""
    return module_bytes(component_modules(pipe).values())


def module_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the parameters and buffers of some modules, shared ones once."""
    tensors = {
        id(tensor): tensor.numel() * tensor.element_size()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(tensors.values())


class PeakMemory:
    """The most memory in use since this object was made.

    Attributes:
        kind: what is measured, as in `Timing.peak_kind`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self.kind = "cuda_allocated"
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self.kind = "rss" if _reset_peak_rss() else "rss_of_process"

    def read(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _peak_rss()


def _reset_peak_rss() -> bool:
    """Sets the peak resident set of this process to its present one; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_rss() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows, which has neither file

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if _is_mac() else 1024)


def _is_mac() -> bool:
    import platform

    return platform.system() == "Darwin"
