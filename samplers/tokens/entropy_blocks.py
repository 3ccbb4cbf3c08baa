"""Blocks that end before what is uncertain."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..errors import InputError
from .blocks import masked_span
from .quota import EvenQuota
from .recipe import Recipe
from .slots import BLOCKS, BlockSchedule
from .state import DecodeState


@BLOCKS.register("entropy-end")
class EntropyEnd(BlockSchedule):
    """A block reaches to the first position whose entropy exceeds a bound, within its shortest and longest length.

    A rule without training for what CtrlDiff (arXiv:2505.14455) learns by reinforcement: the length of the next block.
    It is not that method. Entropies are those of the last evaluation of the block before; where there is none, as for
    the first block, the block has its longest length.
    """

    type: Literal["entropy-end"] = "entropy-end"
    bound: float = Field(default=1.0, ge=0, description="Largest entropy within a block, nats.")
    shortest: int = Field(default=4, ge=1, description="Positions at least.")
    longest: int = Field(default=32, ge=1, description="Positions at most.")

    @model_validator(mode="after")
    def _in_order(self) -> EntropyEnd:
        if self.shortest > self.longest:
            raise ValueError(f"the shortest block, {self.shortest}, is longer than the longest, {self.longest}")
        return self

    def check(self, recipe: Recipe) -> None:
        """Blocks cannot be counted before they are made."""
        if isinstance(recipe.unmask, EvenQuota) and recipe.unmask.steps is not None:
            raise InputError(
                "the entropy-end schedule does not know its number of blocks in advance; give the quota "
                "steps_per_block or tokens"
            )

    def wants(self, state: DecodeState) -> Tensor:
        """What the next block may hold."""
        end = state.block_end[:, None]
        return state.ahead & (state.columns >= end) & (state.columns < end + self.longest)

    def next(self, state: DecodeState) -> tuple[Tensor, Tensor]:
        """From the first mask to the first uncertain one."""
        start, end = masked_span(state.masked)
        entropy = -state.confidence("entropy")
        far = state.columns >= (start + self.shortest)[:, None]
        uncertain, _ = masked_span(far & state.masked & state.known & (entropy > self.bound))
        return start, torch.minimum(torch.minimum(start + self.longest, uncertain), end)

    def count(self, state: DecodeState) -> Tensor:
        """As few as there can be."""
        return state.editable.sum(1).div(self.longest, rounding_mode="floor") + 1
