"""A falling number of masks, chosen by confidence with noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .slots import UNMASKS, Unmask
from .state import DecodeState, top

SCHEDULES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "cosine": lambda time: torch.cos(time * math.pi / 2),
    "linear": lambda time: 1 - time,
    "concave": lambda time: 1 - time**2.5,
}
"""Share of masks that are left, by the share of steps that are done, (B,) float64."""


@UNMASKS.register("maskgit")
class MaskGIT(Unmask):
    """After step i of T, floor(M s(i / T)) of M masks are left (MaskGIT, arXiv:2202.04200, section 3.3).

    s(t) is cos(pi t / 2), 1 - t, or 1 - t^2.5 as in ReCAP (github.com/liebenxj/ReCAP).

    What is committed has the largest log-probability plus Gumbel noise, whose scale goes from the first to the second
    ``temperature`` in equal parts. At least one position is committed in a step and at least one left before the last.
    Draw tokens at temperature 1. The defaults are aMUSEd's (arXiv:2401.01808); MaskGIT takes 4.5 to 0.
    """

    type: Literal["maskgit"] = "maskgit"
    steps: int = Field(default=12, ge=1, description="Of each block.")
    schedule: Literal["cosine", "linear", "concave"] = Field(
        default="cosine", description="Share of masks over the steps; concave is 1 - t^2.5."
    )
    temperature: tuple[float, float] = Field(default=(2.0, 0.0), description="Scale of the noise, first and last.")

    @property
    def clocked(self) -> bool:
        """The schedule is the block's."""
        return True

    def quota(self, state: DecodeState) -> Tensor:
        """(B,) what the schedule does not leave masked."""
        progress = (state.block_step + 1).double() / self.steps
        share = SCHEDULES[self.schedule](progress)
        masks = state.open.sum(1)
        kept = torch.minimum((state.block_masks * share).floor().long().clamp(min=1), masks - 1)
        return masks - torch.where(progress < 1, kept, 0)

    def select(self, state: DecodeState) -> Tensor:
        """The surest, give or take the noise."""
        first, last = self.temperature
        scale = first + (last - first) * (state.block_step / max(self.steps - 1, 1)).clamp(max=1)
        noise = -torch.log(-torch.log(1 - state.uniform("selection")))
        scores = state.confidence("prob").clamp(min=0).log() + scale[:, None] * noise
        return top(scores, state.candidates, self.quota(state))
