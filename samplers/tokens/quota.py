"""A fixed number of tokens per step, the surest first."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..errors import InputError
from .slots import UNMASKS, Unmask
from .state import Confidence, DecodeState, top


def even(total: Tensor, steps: Tensor, index: Tensor) -> Tensor:
    """Share number ``index`` of ``total`` split evenly over ``steps``, the larger shares first; 0 past the last."""
    steps = steps.clamp(min=1)
    share = total // steps + (index < total % steps)
    return torch.where(index < steps, share, 0)


class EvenQuota(Unmask):
    """A number of positions per step that is fixed, or splits the masks of a block evenly over its steps.

    The masks are those that the block had at its start. What a remask policy opened again is committed one by one when
    the steps are over.
    """

    steps: int | None = Field(default=None, ge=1, description="Steps of the whole answer, equally many per block.")
    steps_per_block: int | None = Field(default=None, ge=1, description="Steps of each block.")
    tokens: int | None = Field(default=None, ge=1, description="Tokens per step.")
    confidence: Confidence = Field(
        default="prob", description="What makes a position sure: prob, margin or entropy; or random."
    )

    @model_validator(mode="after")
    def _one_of_three(self) -> EvenQuota:
        if sum(value is not None for value in (self.steps, self.steps_per_block, self.tokens)) != 1:
            raise ValueError("a quota is given by exactly one of steps, steps_per_block and tokens")
        return self

    @property
    def clocked(self) -> bool:
        """Steps are planned, tokens are not."""
        return self.tokens is None

    def begin(self, state: DecodeState) -> None:
        """Splits the steps over the blocks.

        Raises:
            InputError: when they do not split evenly.
        """
        if self.tokens is not None:
            return
        if self.steps_per_block is not None:
            state.memory[self] = torch.full_like(state.first, self.steps_per_block)
            return
        steps, blocks = self.steps or 0, state.recipe.blocks.count(state)
        for count in sorted(set(blocks[state.alive].tolist())):
            if steps % count:
                raise InputError(
                    f"{steps} steps cannot be shared equally by {count} blocks; take a multiple of {count}, or "
                    "give steps_per_block or tokens"
                )
        state.memory[self] = steps // blocks.clamp(min=1)

    def quota(self, state: DecodeState) -> Tensor:
        """(B,) tokens of this step."""
        if self.tokens is not None:
            return torch.full_like(state.first, self.tokens)
        return even(state.block_masks, state.memory[self], state.block_step).clamp(min=1)


@UNMASKS.register("quota")
class Quota(EvenQuota):
    """The surest k open positions of each row (LLaDA's low-confidence remasking, arXiv:2502.09992, appendix A.3)."""

    type: Literal["quota"] = "quota"

    def select(self, state: DecodeState) -> Tensor:
        """The surest."""
        return top(state.confidence(self.confidence), state.candidates, self.quota(state))
