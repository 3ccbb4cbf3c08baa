"""Laws of the three times of the consistency family: where a student starts, a step nearer its end, and its end."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..samplers.errors import InputError
from ..samplers.process import Process
from ..samplers.schedules import TableSchedule
from .times import Draws, TimeLaw, check_weights, indices, uniform


class Span(NamedTuple):
    """Three times of each sample, each (B,) float64.

    Attributes:
        t: where the student starts.
        r: one step of the teacher nearer to the end.
        s: the end, at which both jumps land; may be ``r``.
    """

    t: Tensor
    r: Tensor
    s: Tensor


class SpanLaw(ABC):
    """A joint law of t, r and s."""

    @abstractmethod
    def __call__(self, process: Process, count: int, draws: Draws) -> Span:
        """``count`` spans of ``process``."""


@dataclass(frozen=True)
class GridSpans(SpanLaw):
    """Neighbours on a grid, and the end of the segment they are in.

    One segment is consistency distillation (arXiv:2303.01469) and LCM (arXiv:2310.04378); several are PCM
    (arXiv:2405.18407) and both directions of iCD (arXiv:2406.14539).

    Args:
        points: times of the process from the cleanest end to the noisiest, at least 2.
        edges: indices of points where segments begin, rising from 0 (`segment_edges`).
        weights: how often each of the intervals between points is drawn, cleanest first; None for equally often.
        forward: towards noise: t is the cleaner of the neighbours, and s the noisier end of the segment.
    """

    points: tuple[float, ...]
    edges: tuple[int, ...] = (0,)
    weights: tuple[float, ...] | None = None
    forward: bool = False

    def __post_init__(self) -> None:
        intervals = len(self.points) - 1
        if intervals < 1:
            raise InputError(f"a grid needs at least 2 points; got {len(self.points)}")
        _check_edges(self.edges, intervals)
        check_weights(self.weights, intervals)

    def __call__(self, process: Process, count: int, draws: Draws) -> Span:
        points = torch.tensor(self.points, dtype=torch.float64)
        edges = torch.tensor((*self.edges, len(self.points) - 1))
        lower = indices(self.weights, len(self.points) - 1, count, draws)
        segment = torch.searchsorted(edges, lower, right=True)
        if self.forward:
            return Span(points[lower], points[lower + 1], points[edges[segment]])
        return Span(points[lower + 1], points[lower], points[edges[segment - 1]])


@dataclass(frozen=True)
class TrajectorySpans(SpanLaw):
    """Neighbours on a grid, and any point from the cleaner of them to where their segment begins.

    One segment is TCD (arXiv:2402.19159), several are Hyper-SD's TSCD (arXiv:2404.13686).

    Args:
        points: times of the process from the cleanest end to the noisiest, at least 2.
        edges: indices of points where segments begin, rising from 0 (`segment_edges`).
    """

    points: tuple[float, ...]
    edges: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if len(self.points) < 2:
            raise InputError(f"a grid needs at least 2 points; got {len(self.points)}")
        _check_edges(self.edges, len(self.points) - 1)

    def __call__(self, process: Process, count: int, draws: Draws) -> Span:
        points, edges = torch.tensor(self.points, dtype=torch.float64), torch.tensor(self.edges)
        lower = indices(None, len(self.points) - 1, count, draws)
        first = edges[torch.searchsorted(edges, lower, right=True) - 1]
        end = first + (uniform(draws, count) * (lower - first + 1)).floor().long()
        return Span(points[lower + 1], points[lower], points[end])


@dataclass(frozen=True)
class TuningSpans(SpanLaw):
    """Consistency tuning (arXiv:2406.14548): any t, r a share of it, s clean data.

    With u = sigma/alpha, r is at max(0, 1 - n(u) / q^(stage + 1)) u, n(u) = 1 + k sigmoid(-b u): the first stages
    have r = 0 for small u, which is plain denoising, and from stage to stage r nears t. An r below the process's
    cleanest time is clean data: no network is asked there, and the gap is never 0. The exponent is that of the
    released code, whose stages are counted from 0.

    Args:
        times: law of t.
        stage: how often the gap has shrunk by q, at least 0.
        q: above 1.
        k: how much wider the gap is at small u, at least 0.
        b: how fast that fades, above 0.
    """

    times: TimeLaw
    stage: int = 0
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0

    def __post_init__(self) -> None:
        if self.stage < 0:
            raise InputError(f"stage must be 0 or more; got {self.stage}")
        if not (1 < self.q < math.inf and 0 <= self.k < math.inf and 0 < self.b < math.inf):
            raise InputError(f"q must exceed 1, k be 0 or more, b positive; got {self.q:g}, {self.k:g}, {self.b:g}")

    def __call__(self, process: Process, count: int, draws: Draws) -> Span:
        t = self.times(process, count, draws)
        u = (-process.log_snr(t) / 2).exp()
        share = 1 - (1 + self.k * torch.sigmoid(-self.b * u)) / self.q ** (self.stage + 1)
        log_snr = process.log_snr(t) - 2 * share.clamp(min=0).log()
        clean = torch.full_like(t, process.clean_time)
        r = torch.where(log_snr > process.log_snr(process.time_range.cleanest), clean, process.time_of_log_snr(log_snr))
        return Span(t, r, clean)


def even_points(process: Process, steps: int) -> tuple[float, ...]:
    """``steps`` + 1 points for a grid, even in the scheduler's own spacing.

    On a table of N times they are LCM's: 0, and round(k N/steps) - 1 for k = 1 to steps, so that 50 of 1000 are
    0, 19, 39, ..., 999 (arXiv:2310.04378). Elsewhere the fractions k/steps of `Process.from_uniform`.

    Raises:
        InputError: when ``steps`` is below 1, or as many as a table has times.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1; got {steps}")
    if not isinstance(process.schedule, TableSchedule):
        fractions = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        return tuple(process.from_uniform(fractions).tolist())
    length = int(process.time_range.noisiest) + 1
    if steps >= length:
        raise InputError(f"a table of {length} times has no {steps} steps of more than one each; take fewer")
    return 0.0, *(float(round(index * length / steps) - 1) for index in range(1, steps + 1))


def karras_points(
    process: Process, count: int, rho: float = 7.0, low: float | None = None, high: float | None = None
) -> tuple[float, ...]:
    """``count`` points for a grid, even in (sigma/alpha)^(1/rho), arXiv:2206.00364 equation 5.

    Args:
        process: the noise levels.
        count: at least 2.
        rho: exponent, above 0.
        low: sigma/alpha of the first, above 0; None for the cleanest of the process.
        high: sigma/alpha of the last, finite; None for the noisiest of the process.

    Raises:
        InputError: when an argument is out of range, or left out on a process whose own end has no noise or no data.
    """
    ends = [(-process.log_snr(end) / 2).exp().item() for end in process.time_range]
    first, last = ends[0] if low is None else low, ends[1] if high is None else high
    if count < 2 or not rho > 0:
        raise InputError(f"karras points need a count of 2 or more and a positive rho; got {count} and {rho:g}")
    if not 0 < first < last < math.inf:
        raise InputError(f"sigma/alpha must rise from above 0 and stay finite; got {first:g} to {last:g}, give both")
    roots = torch.linspace(first ** (1 / rho), last ** (1 / rho), count, dtype=torch.float64)
    return tuple(process.time_of_log_snr(-2 * rho * roots.log()).tolist())


def segment_edges(steps: int, segments: int) -> tuple[int, ...]:
    """Indices where ``segments`` even segments of ``steps`` intervals begin, rounded down as PCM's code has them.

    The segments of a multiple of ``segments`` lie within these.

    Raises:
        InputError: when there are more segments than steps, or none.
    """
    if not 1 <= segments <= steps:
        raise InputError(f"segments must be 1 to {steps}, the number of steps; got {segments}")
    return tuple(index * steps // segments for index in range(segments))


def _check_edges(edges: tuple[int, ...], intervals: int) -> None:
    rising = all(a < b for a, b in pairwise(edges))
    if not edges or edges[0] != 0 or not rising or edges[-1] >= intervals:
        raise InputError(f"edges must rise from 0 and stay below {intervals}, the last point; got {edges}")


def normal_weights(levels: Sequence[float], mean: float = -1.1, std: float = 2.0) -> tuple[float, ...]:
    """Weights of the intervals between noise levels under a log-normal law, arXiv:2310.14189 section 3.5.

    Args:
        levels: sigma/alpha of the points, rising, above 0.
        mean: of log(sigma/alpha).
        std: of it, above 0.
    """
    points = (torch.tensor(levels, dtype=torch.float64).log() - mean) / (math.sqrt(2) * std)
    return tuple(torch.special.erf(points).diff().tolist())


def ct_count(step: int, steps: int, first: int = 2, last: int = 150) -> int:
    """Number of grid points at a step of consistency training: N(k) of arXiv:2303.01469 appendix C."""
    return math.ceil(math.sqrt(step / steps * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1


def ct_decay(count: int, first: int = 2, decay: float = 0.95) -> float:
    """Decay of the target's average with ``count`` grid points: mu(k) of arXiv:2303.01469 appendix C."""
    return math.exp(first * math.log(decay) / count)


def ict_count(step: int, steps: int, first: int = 10, last: int = 1280) -> int:
    """Number of grid points at a step of improved consistency training: N(k) of arXiv:2310.14189 section 3.4.

    It doubles every ``steps`` / (log2(last / first) + 1) steps.
    """
    length = max(1, math.floor(steps / (math.log2(last // first) + 1)))
    return int(min(first * 2.0 ** (step // length), last)) + 1
