"""As many as the surest of them warrant together."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .slots import UNMASKS, Unmask
from .state import DecodeState, top


@UNMASKS.register("factor")
class Factor(Unmask):
    """The n surest open positions, n the largest with (n + 1) (1 - p_n) <= factor (Fast-dLLM, arXiv:2505.22618, 3.3).

    p_n is the n-th largest probability; at factor 1 the tokens are then the likeliest ones jointly (its theorem 1).
    This is the closed rule of the paper: the released loop also commits the first position that fails it when that is
    the last one.
    """

    type: Literal["factor"] = "factor"
    factor: float = Field(default=1.0, gt=0, description="Larger commits more.")

    def select(self, state: DecodeState) -> Tensor:
        """The surest that hold, and the surest in any case."""
        confidence = state.confidence("prob")
        ordered = confidence.masked_fill(~state.candidates, -torch.inf).sort(dim=1, descending=True).values
        holds = (state.columns + 2) * (1 - ordered) <= self.factor
        return top(confidence, state.candidates, holds.sum(1).clamp(min=1))
