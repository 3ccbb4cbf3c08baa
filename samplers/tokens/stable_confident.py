"""All at once when the predictions stand still."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .slots import EXITS, Exit
from .state import DecodeState


@EXITS.register("stable-confident")
class StableConfident(Exit):
    """Commits all masks when their likeliest tokens have not changed for some steps and are sure.

    DiffusionGemma's criterion (transformers and diffusers), over masked positions: every likeliest token is that of the
    ``steps`` evaluations before, and the mean entropy is below the bound.
    """

    type: Literal["stable-confident"] = "stable-confident"
    steps: int = Field(default=1, ge=1, description="Evaluations that agree with the one before them.")
    entropy: float = Field(default=0.005, gt=0, description="Bound of the mean entropy, nats.")
    scope: Literal["answer", "block"] = Field(default="answer", description="Which masks are looked at and committed.")

    def begin(self, state: DecodeState) -> None:
        """No token yet, and no streak."""
        state.memory[self] = (torch.full_like(state.x, -1), torch.zeros_like(state.x))

    def wants(self, state: DecodeState) -> Tensor | None:
        """All masks that can be predicted, or those of the block alone."""
        return state.ahead if self.scope == "answer" else None

    def all_in(self, state: DecodeState) -> Tensor:
        """Where all stand still."""
        before, streak = state.memory[self]
        likeliest = state.x.new_full(state.x.shape, -1)
        likeliest[state.at] = state.logits.argmax(-1)
        streak = torch.where(state.known & (likeliest == before), streak + 1, 0)
        state.memory[self] = (likeliest, streak)
        masks = state.masked & state.known
        stable = (~masks | (streak >= self.steps)).all(1)
        entropy = torch.where(masks, -state.confidence("entropy"), 0.0).sum(1) / masks.sum(1).clamp(min=1)
        return stable & (entropy < self.entropy)
