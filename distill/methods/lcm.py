"""Latent consistency distillation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field
from torch import nn

from ...samplers.process import Process
from ..method import METHODS, Loss, Moment
from ..role_kinds import Kind
from ..sources import Batch
from ..spans import GridSpans, SpanLaw
from ..team import Team
from .matching import Distilling
from .multistep import MultistepOnGrid
from .telling import Telling


@METHODS.register("lcm")
class LCM(MultistepOnGrid, Telling, Distilling):
    """Latent consistency models (arXiv:2310.04378 algorithm 1): to clean data from any time, over skipped steps.

    As in diffusers' script, with two differences: the last interval ends at clean data instead of timestep 0, and the
    guidance scale is g of uncond + g (cond - uncond), which is the paper's w + 1. With ``embed_guidance`` the student
    is told it, as the paper has it, by a layer that begins at zero; the script's begins at random.
    """

    type: Literal["lcm"] = "lcm"
    target_decay: float | None = Field(
        default=0.95, ge=0, lt=1, description="Of the average that is the target; none for the student itself."
    )

    def spans(self, process: Process, moment: Moment) -> SpanLaw:
        """Neighbours on the grid, and clean data."""
        return GridSpans(self.points(process))

    def kinds(self, student: Kind, network: nn.Module) -> Mapping[str, Kind]:
        """Student, teacher, and the average where there is one."""
        self.refuse_adapter(student)
        return super().kinds(student, network)

    def losses(self, batch: Batch, roles: Team, moment: Moment) -> Iterator[Loss]:
        """The match, of a student that may be told the guidance scale."""
        yield from super().losses(*self.drawn(batch, roles, moment), moment)
