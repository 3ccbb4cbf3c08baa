"""Block schedules that do not look at the logits."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import InputError
from .denoiser import Denoiser
from .slots import BLOCKS, BlockSchedule
from .state import DecodeState


def masked_span(masks: Tensor) -> tuple[Tensor, Tensor]:
    """First column (B,) of each row's masks and the column after the last one; (L, 0) for a row with none."""
    length = masks.shape[1]
    columns = torch.arange(length, device=masks.device)
    starts = torch.where(masks, columns, length).amin(1)
    return starts, torch.where(masks, columns + 1, 0).amax(1)


def offsets(state: DecodeState) -> Tensor:
    """(B, L) int64, columns counted from the row's first position to be generated; negative before it."""
    first, _ = masked_span(state.editable)
    return state.columns - first[:, None]


def starts(numbers: Tensor) -> Tensor:
    """(B, L) bool, the first column of each run of equal numbers."""
    fresh = torch.ones_like(numbers, dtype=torch.bool)
    fresh[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return fresh


@BLOCKS.register("whole")
class Whole(BlockSchedule):
    """All masks at once, wherever they are."""

    type: Literal["whole"] = "whole"

    def next(self, state: DecodeState) -> tuple[Tensor, Tensor]:
        """From the first mask to the last."""
        return masked_span(state.masked)

    def count(self, state: DecodeState) -> Tensor:
        """One."""
        return torch.ones_like(state.first)


class Numbered(BlockSchedule):
    """Blocks that are known from the start: the columns with one number.

    The next block is the first with masks, so that what a remask policy opened again comes before what is to the right
    of it.
    """

    @abstractmethod
    def numbers(self, state: DecodeState) -> Tensor:
        """(B, L) int64, the block of each column; does not decrease along a row."""

    def next(self, state: DecodeState) -> tuple[Tensor, Tensor]:
        """The first block that has masks."""
        numbers = self.numbers(state)
        start, _ = masked_span(state.masked)
        index = start.clamp(max=numbers.shape[1] - 1)[:, None]
        return masked_span((numbers == numbers.gather(1, index)) & state.editable & state.present)

    def count(self, state: DecodeState) -> Tensor:
        """Blocks with positions to be generated."""
        block = starts(self.numbers(state)).long().cumsum(1) - 1
        held = torch.zeros_like(block).scatter_add(1, block, state.editable.long())
        return (held > 0).sum(1)


class EqualBlocks(Numbered):
    """Blocks of equal length from left to right.

    They are counted from the row's first position to be generated, or are those of a block-causal denoiser's
    attention; the first and the last may then be shorter.
    """

    length: int | None = Field(
        default=32, ge=1, description="Positions in a block; none: the blocks of the denoiser's attention."
    )

    def suits(self, denoiser: Denoiser) -> None:
        """A denoiser with full attention has no blocks."""
        if self.length is None and denoiser.spec.block_length is None:
            raise InputError(
                f"the denoiser has full attention and no blocks of its own; give the {self.type} schedule a length"
            )

    def numbers(self, state: DecodeState) -> Tensor:
        """By length, or the attention's."""
        if self.length is None:
            return state.model_blocks
        return offsets(state).div(self.length, rounding_mode="floor")


@BLOCKS.register("fixed")
class Fixed(EqualBlocks):
    """Blocks of equal length, one after the other (semi-autoregressive: LLaDA, arXiv:2502.09992, and Fast-dLLM)."""

    type: Literal["fixed"] = "fixed"
