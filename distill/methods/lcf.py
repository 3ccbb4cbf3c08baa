"""Latent consistency fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...samplers.process import Process
from ..method import METHODS, Moment
from ..spans import GridSpans, SpanLaw
from .matching import Tuning
from .multistep import MultistepOnGrid


@METHODS.register("lcf")
class LCF(MultistepOnGrid, Tuning):
    """Latent consistency fine-tuning (arXiv:2310.04378 algorithm 4): a consistency model learns data of one's own.

    No teacher is asked: both points of a match are the same data with the same noise. The pipeline's network should be
    a latent consistency model already. From a diffusion model this is consistency training, and takes far longer.
    """

    type: Literal["lcf"] = "lcf"
    target_decay: float | None = Field(
        default=0.95, ge=0, lt=1, description="Of the average that is the target; none for the student itself."
    )

    def spans(self, process: Process, moment: Moment) -> SpanLaw:
        """Neighbours on the grid, and clean data."""
        return GridSpans(self.points(process))
