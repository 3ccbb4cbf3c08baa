"""Match: the student's jump from a point is that from a point one step nearer, the loss of the consistency family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...samplers.process import Process
from ..distances import L2, Distance, wide
from ..jumps import Denoiser, Jump, Landing
from ..spans import Span

#: Factor of a sample's loss from the process and its times t and r: float64 (B,), no gradient.
SpanWeight = Callable[[Process, Tensor, Tensor], Tensor]


def inverse_gap(process: Process, t: Tensor, r: Tensor) -> Tensor:
    """1 / (u_t - u_r) with u = sigma/alpha, the weight of arXiv:2310.14189 section 3.1; the gap counts in size."""
    u_t, u_r = ((-process.log_snr(time) / 2).exp() for time in (t, r))
    return 1 / (u_t - u_r).abs()


@dataclass(frozen=True)
class Match:
    """weight(t, r) d(J(student; x_t, t to s), sg[J(target; x_r, r to s)]), equation 7 of arXiv:2303.01469.

    With x_r from x_t by a solver of the teacher it is distillation: CD, LCM, PCM, TCD, TSCD, iCD. With x_r the same
    data and noise at r it is training or tuning without teacher: CT, iCT, ECT, LCF. Forward spans (r noisier than t,
    s noisier still) train iCD's forward student. Where r is s the goal is x_r itself, which no network is asked for;
    PCM and iCD have this hard boundary, and for `LCMBoundary` and `CMBoundary` it is what they give there.

    Args:
        process: the noise levels.
        jump: the student's parametrisation; the target's is the same.
        distance: between the two landings.
        weight: factor by t and r; None for 1.
    """

    process: Process
    jump: Jump = field(default_factory=Landing)
    distance: Distance = field(default_factory=L2)
    weight: SpanWeight | None = None

    def __call__(self, student: Denoiser, target: Denoiser, x_t: Tensor, x_r: Tensor, span: Span) -> Tensor:
        """The loss of each sample, (B,), at least float32. Its gradient reaches the student (and x_t) alone.

        Args:
            student: asked at (x_t, t) with gradient.
            target: asked at (x_r, r) without: the student itself, or its average.
            x_t: states (B, ...) at ``span.t``.
            x_r: the same samples at ``span.r``.
            span: the three times.

        Raises:
            InputError: when shapes disagree or a time is not permitted.
        """
        loss = self.preserve(student, x_t, span.t, span.s, self.goal(target, x_r, span))
        if self.weight is None:
            return loss
        return loss * self.weight(self.process, span.t, span.r).to(loss)

    @torch.no_grad()
    def goal(self, target: Denoiser, x_r: Tensor, span: Span) -> Tensor:
        """Where the target lands at s from (x_r, r): x_r itself where r is s. Shape of x_r, at least float32."""
        x_r = wide(x_r)
        there = span.r == span.s
        asked = torch.where(there, span.t, span.r)  # s may be clean data, at which a network is not asked
        landed = self.jump(self.process, x_r, asked, span.s, target(x_r, asked))
        return torch.where(there.to(x_r.device).view(-1, *(1,) * (x_r.ndim - 1)), x_r, landed)

    def preserve(self, student: Denoiser, x: Tensor, t: Tensor, s: Tensor, goal: Tensor) -> Tensor:
        """d(J(student; x, t to s), goal) of each sample, (B,): the jump lands on a known point.

        iCD's cycle consistency (arXiv:2406.14539): x is where the other student landed from ``goal``.

        Args:
            student: asked at (x, t).
            x: states (B, ...) at ``t``.
            t: (B,), where the jump starts.
            s: (B,), where it lands.
            goal: shape of x; no gradient goes there.
        """
        return self.distance(self.jump(self.process, x, t, s, student(x, t)), goal.detach())
