"""Tokens that are replaced when the denoiser has come to think otherwise."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .slots import REMASKS, Choice, Remask
from .state import DecodeState


@REMASKS.register("edit")
class Edit(Remask):
    """Replaces committed tokens of the block by others that are more probable than the threshold (LLaDA2.1).

    When the block is full it goes on for as many steps as there are edits, at most ``post_steps``. The defaults are
    those of diffusers' ``LLaDA2Pipeline``, whose loop takes one step more than it says.
    """

    type: Literal["edit"] = "edit"
    threshold: float = Field(default=0.5, gt=0, le=1, description="Probability that another token has to exceed.")
    post_steps: int = Field(default=16, ge=0, description="Most steps of a block after its last mask.")

    def begin(self, state: DecodeState) -> None:
        """No step without masks, and no edit so far."""
        state.memory[self] = (torch.zeros_like(state.first), torch.zeros_like(state.alive))

    def wants(self, state: DecodeState) -> Tensor:
        """All of the block that a step evaluates: up to the last attention block with masks, in the end everything."""
        return state.in_block & state.editable & state.reach(state.open)

    def select(self, state: DecodeState, committed: Tensor) -> Choice:
        """What has another proposal that is probable."""
        mine = state.in_block & state.editable & state.known & ~committed & (state.x != state.spec.mask_id)
        edits = mine & (state.x0 != state.x) & (state.confidence("prob") > self.threshold)
        posts, _ = state.memory[self]
        state.memory[self] = (torch.where(state.held, posts + 1, 0), edits.any(1))
        return Choice(edits, state.x0)

    def holds(self, state: DecodeState) -> Tensor:
        """While there are edits and steps."""
        memory: tuple[Tensor, Tensor] = state.memory[self]
        posts, edited = memory
        return (posts < self.post_steps) & (edited | ~state.held)

    def limit(self, generated: int) -> int:
        """The steps of as many blocks as there can be."""
        return self.post_steps * generated
