"""Everything that is sure enough, or else what the time asks for."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .slots import UNMASKS, Unmask
from .state import Confidence, DecodeState, top


@UNMASKS.register("dimple")
class Dimple(Unmask):
    """Open positions above a threshold; where there are none, a quota from a grid of times (Dimple, arXiv:2505.16990).

    The quota of a row that has m of M masks left goes to the next time of ``linspace(1, end, steps + 1)`` at which
    fewer are due, floor(m - time M) >= 1 positions. The last step commits everything. Unlike in the released code,
    quotas are counted by row and not over the batch.
    """

    type: Literal["dimple"] = "dimple"
    threshold: float = Field(default=0.95, ge=0, le=1, description="Probability that the proposed token exceeds.")
    steps: int = Field(default=64, ge=1, description="Of the grid, in each block.")
    end: float = Field(default=1e-3, ge=0, lt=1, description="Last time of the grid.")
    confidence: Confidence = Field(default="random", description="What the quota takes first.")

    @property
    def clocked(self) -> bool:
        """The grid is laid over the block."""
        return True

    def due(self, state: DecodeState) -> Tensor:
        """(B,) the quota where nothing is sure."""
        left, total = state.open.sum(1, keepdim=True), state.block_masks[:, None]
        grid = torch.linspace(1, self.end, self.steps + 1, dtype=torch.float64, device=left.device)
        number = torch.arange(self.steps + 1, device=left.device)
        counts = (left - grid * total).floor().long()
        counts = torch.where((number > state.block_step[:, None]) & (counts >= 1), counts, 0)
        first = (counts > 0).long().argmax(1, keepdim=True)
        due = counts.gather(1, first)[:, 0].clamp(min=1)
        return torch.where(state.block_step >= self.steps - 1, left[:, 0], due)

    def select(self, state: DecodeState) -> Tensor:
        """The sure ones, or the quota."""
        sure = state.candidates & (state.confidence("prob") > self.threshold)
        due = self.due(state)
        rest = top(state.confidence(self.confidence), state.candidates, due)
        wait = sure.any(1) & (state.block_step < self.steps - 1)
        return torch.where(wait[:, None], sure, rest)
