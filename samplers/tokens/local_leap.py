"""A lower threshold near what is sure."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import max_pool1d

from .slots import UNMASKS, Unmask
from .state import DecodeState, top


@UNMASKS.register("local-leap")
class LocalLeap(Unmask):
    """Anchors above a threshold, and what reaches a lower one within their radius (LocalLeap, arXiv:2510.07081).

    Anchors are open positions of this step; where there are none the surest position is committed.
    """

    type: Literal["local-leap"] = "local-leap"
    threshold: float = Field(default=0.9, ge=0, le=1, description="Probability of an anchor.")
    relaxed: float = Field(default=0.75, ge=0, le=1, description="Probability near an anchor.")
    radius: int = Field(default=4, ge=0, description="Positions to each side of an anchor.")

    @model_validator(mode="after")
    def _lower(self) -> LocalLeap:
        if self.relaxed > self.threshold:
            raise ValueError("relaxed has to be at most the threshold")
        return self

    def select(self, state: DecodeState) -> Tensor:
        """Anchors, their neighbours, and the best."""
        confidence = state.confidence("prob")
        best = top(confidence, state.candidates, state.alive.long())
        anchors = state.candidates & (confidence >= self.threshold)
        near = max_pool1d(anchors[:, None].float(), 2 * self.radius + 1, stride=1, padding=self.radius)[:, 0] > 0
        return best | (state.candidates & ((near & (confidence >= self.relaxed)) | anchors))
