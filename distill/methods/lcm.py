"""Latent consistency distillation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...samplers.process import Process
from ..method import METHODS, Moment
from ..spans import GridSpans, SpanLaw
from .matching import Distilling
from .multistep import MultistepOnGrid


@METHODS.register("lcm")
class LCM(MultistepOnGrid, Distilling):
    """Latent consistency models (arXiv:2310.04378 algorithm 1): to clean data from any time, over skipped steps.

    As in diffusers' script, with two differences: the last interval ends at clean data instead of timestep 0, and the
    guidance scale is g of uncond + g (cond - uncond), which is the paper's w + 1.
    """

    type: Literal["lcm"] = "lcm"
    target_decay: float | None = Field(
        default=0.95, ge=0, lt=1, description="Of the average that is the target; none for the student itself."
    )

    def spans(self, process: Process, moment: Moment) -> SpanLaw:
        """Neighbours on the grid, and clean data."""
        return GridSpans(self.points(process))
