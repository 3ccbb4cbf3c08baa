"""Consistency tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...samplers import Plan
from ...samplers.process import Process
from ..method import METHODS, Moment
from ..spans import SpanLaw, TuningSpans, even_points
from ..terms.match import SpanWeight, inverse_gap
from ..times import LogNormalTimes
from .matching import Tuning
from .multistep import Multistep


@METHODS.register("ect")
class ECT(Multistep, Tuning):
    """Consistency tuning (arXiv:2406.14548): a diffusion model becomes a consistency model on data alone.

    It begins as denoising, and every ``stage_steps`` updates the second point of a match moves nearer to the first.
    The gap follows the released code, where the first stage is 0; there the distance is the plain norm, here that with
    the constant of improved consistency training (arXiv:2310.14189). A ``q`` of 256 and one stage is the code's recipe
    of an hour. Student and target draw the same dropout.
    """

    type: Literal["ect"] = "ect"
    stage_steps: int = Field(default=10000, ge=1, description="Updates between two shrinkings of the gap.")
    stages: int = Field(default=8, ge=1, description="After so many the gap stays.")
    q: float = Field(default=2.0, gt=1, description="By how much the gap shrinks from stage to stage.")
    k: float = Field(default=8.0, ge=0, description="How much wider it is at small noise levels.")
    b: float = Field(default=1.0, gt=0, description="How fast that fades with the noise level.")
    time_mean: float = Field(default=-1.1, description="Of log(sigma/alpha), a normal law.")
    time_std: float = Field(default=2.0, gt=0, description="Of log(sigma/alpha).")
    distance: Literal["l2", "l1", "huber", "pseudo-huber"] = Field(
        default="pseudo-huber", description="Of the two jumps."
    )

    def spans(self, process: Process, moment: Moment) -> SpanLaw:
        """Any time, a share of it, and clean data."""
        stage = min(moment.step // self.stage_steps, self.stages - 1)
        return TuningSpans(LogNormalTimes(self.time_mean, self.time_std), stage, self.q, self.k, self.b)

    def weight(self) -> SpanWeight:
        """One over the gap."""
        return inverse_gap

    def plan(self, process: Process, steps: int) -> Plan:
        """Multistep consistency sampling at even times of the process's own spacing; all times are trained."""
        return self.sampled_at(process, even_points(process, steps)[:0:-1])
