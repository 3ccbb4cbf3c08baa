"""Twice as many tokens in each step as in the one before."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import InputError
from .blocks import Numbered, masked_span, offsets
from .slots import BLOCKS, UNMASKS, Unmask
from .state import Confidence, DecodeState, top


def power_below(numbers: Tensor) -> Tensor:
    """The largest e with 2^e <= number, 0 for numbers below 1."""
    powers = 2 ** torch.arange(62, device=numbers.device)
    return ((powers <= numbers[..., None]).sum(-1) - 1).clamp(min=0)


@BLOCKS.register("ass")
class AscendingBlocks(Numbered):
    """Blocks for ascending steps (ASS, arXiv:2509.23924): the last k - 1 ascending steps have a block of their own.

    Of n positions, S = floor(log2 n), the blocks start at 0, 2^(S - k + 1) - 1, 2^(S - k + 2) - 1 and so on; the last
    one ends with the answer.
    """

    type: Literal["ass"] = "ass"
    block_num: int = Field(default=1, ge=1, description="k.")

    def begin(self, state: DecodeState) -> None:
        """Raises `InputError` when there are too few positions for the blocks."""
        sizes = self._sizes(state)[state.alive]
        if self.block_num > 1 and int(power_below(sizes).min()) < self.block_num:
            raise InputError(
                f"{self.block_num} ascending blocks need at least {2**self.block_num} positions; got "
                f"{int(sizes.min())}; lower block_num or generate more"
            )

    def numbers(self, state: DecodeState) -> Tensor:
        """By the power of two that an offset has passed."""
        shift = power_below(self._sizes(state)) - self.block_num
        return (power_below(offsets(state) + 1) - shift[:, None]).clamp(0, self.block_num - 1)

    def _sizes(self, state: DecodeState) -> Tensor:
        first, last = masked_span(state.editable)
        return last - first


@UNMASKS.register("ass")
class Ascending(Unmask):
    """The surest 2^i open positions in step i of a block, and in the last step all (ASS, arXiv:2509.23924).

    A block of 2^S - 1 positions or some more takes S steps. With the "ass" blocks, those after the first are one step
    each. The last step commits half of the answer at once, whatever depends on what.
    """

    type: Literal["ass"] = "ass"
    confidence: Confidence = Field(default="prob", description="What makes a position sure.")

    @property
    def clocked(self) -> bool:
        """The steps are the block's."""
        return True

    def quota(self, state: DecodeState) -> Tensor:
        """(B,) tokens of this step."""
        due = 2 ** state.block_step.clamp(max=61)
        last = state.block_step + 1 >= power_below(state.block_masks + 1)
        if isinstance(state.recipe.blocks, AscendingBlocks):
            last = last | (state.block_index > 0)
        return torch.where(last, state.block_masks, due)

    def select(self, state: DecodeState) -> Tensor:
        """The surest."""
        return top(state.confidence(self.confidence), state.candidates, self.quota(state))
