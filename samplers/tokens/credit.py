"""Logits that remember what was likeliest before."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .slots import LOGITS, LogitsProcessor
from .state import DecodeState


@LOGITS.register("credit")
class Credit(LogitsProcessor):
    """Adds weight log(1 + credit) to the logits of masks (CreditDecoding, arXiv:2510.06133, with dInfer's numbers).

    In each step the credits of a position decay, and its likeliest token, of probability p, earns p^power. Tokens that
    stay likeliest step after step pass a threshold earlier. Credits take 4 bytes for each position and token.
    """

    type: Literal["credit"] = "credit"
    weight: float = Field(default=0.7, ge=0, description="Of the logarithm.")
    decay: float = Field(default=0.8, ge=0, lt=1, description="Of credits, per step.")
    power: float = Field(default=0.2, gt=0, le=1, description="Of the probability that is credited.")

    def begin(self, state: DecodeState) -> None:
        """No credit."""
        shape = (*state.x.shape, state.spec.vocab_size)
        state.memory[self] = torch.zeros(shape, device=state.x.device)

    def process(self, state: DecodeState, logits: Tensor) -> Tensor:
        """The logits with their credit."""
        stored: Tensor = state.memory[self]
        if state.spec.mask_id < logits.shape[1]:
            logits = logits.index_fill(1, torch.tensor([state.spec.mask_id], device=logits.device), -torch.inf)
        best, token = logits.softmax(-1).max(-1)
        earned = torch.where(state.open[state.at], best**self.power, 0.0).to(stored.dtype)
        updated = stored[state.at] * self.decay
        updated.scatter_add_(1, token[:, None], earned[:, None])
        stored[state.at] = updated
        return logits + (self.weight * updated.log1p()).to(logits.dtype)
