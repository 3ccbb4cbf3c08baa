"""Blocks within blocks."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .blocks import EqualBlocks, starts
from .slots import BLOCKS
from .state import DecodeState


@BLOCKS.register("nested")
class Nested(EqualBlocks):
    """Blocks that are filled sub-block by sub-block, from left to right (Fast-dLLM v2, arXiv:2509.26328).

    Policies see the sub-block as the active block. With ``length`` None the blocks are those of the attention, which is
    what the sub-block cache works with.
    """

    type: Literal["nested"] = "nested"
    inner: int = Field(default=8, ge=1, description="Positions in a sub-block.")

    @model_validator(mode="after")
    def _within(self) -> Nested:
        if self.length is not None and self.inner > self.length:
            raise ValueError(f"a sub-block of {self.inner} does not fit into a block of {self.length}")
        return self

    def numbers(self, state: DecodeState) -> Tensor:
        """Of sub-blocks, which start anew with each block."""
        fresh = starts(super().numbers(state))
        within = state.columns - torch.where(fresh, state.columns, 0).cummax(1).values
        return (within % self.inner == 0).long().cumsum(1)
