"""Everything that is sure enough."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from .slots import UNMASKS, Unmask
from .state import DecodeState, top


@UNMASKS.register("threshold")
class Threshold(Unmask):
    """Open positions whose token is at least this probable, and the surest one (Fast-dLLM, arXiv:2505.22618, 3.3)."""

    type: Literal["threshold"] = "threshold"
    threshold: float = Field(default=0.9, ge=0, le=1, description="Probability of the proposed token.")

    def select(self, state: DecodeState) -> Tensor:
        """Those at or above the threshold, and the best."""
        confidence = state.confidence("prob")
        best = top(confidence, state.candidates, state.alive.long())
        return best | (state.candidates & (confidence >= self.threshold))
