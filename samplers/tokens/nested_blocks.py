"""Blocks within blocks."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .blocks import EqualBlocks, first_with_masks, starts
from .slots import BLOCKS
from .state import DecodeState


@BLOCKS.register("nested")
class Nested(EqualBlocks):
    """Blocks that are filled sub-block by sub-block, from left to right (Fast-dLLM v2, arXiv:2509.26328).

    Policies see the sub-block as the active block; a cache that works with both asks for ``outer``.
    """

    type: Literal["nested"] = "nested"
    inner: int = Field(default=8, ge=1, description="Positions in a sub-block.")

    @model_validator(mode="after")
    def _within(self) -> Nested:
        if self.length is not None and self.inner > self.length:
            raise ValueError(f"a sub-block of {self.inner} does not fit into a block of {self.length}")
        return self

    def outer(self, state: DecodeState) -> tuple[Tensor, Tensor]:
        """First column (B,) of the block that the first mask is in, and the column after its last."""
        return first_with_masks(state, super().numbers(state))

    def numbers(self, state: DecodeState) -> Tensor:
        """Of sub-blocks, which start anew with each block."""
        fresh = starts(super().numbers(state))
        within = state.columns - torch.where(fresh, state.columns, 0).cummax(1).values
        return (within % self.inner == 0).long().cumsum(1)
