"""A window that moves with the first mask."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import InputError
from .blocks import masked_span
from .recipe import Recipe
from .slots import BLOCKS, BlockSchedule
from .state import DecodeState


@BLOCKS.register("sliding")
class Sliding(BlockSchedule):
    """The positions from the first mask on, in every step anew: what FlashDLM (arXiv:2505.21467) decodes.

    There is one block, as long as the answer, of which a window is open. Unmask policies that plan the steps of a block
    do not go with it.
    """

    type: Literal["sliding"] = "sliding"
    slides: ClassVar[bool] = True
    length: int = Field(default=32, ge=1, description="Positions in the window.")

    def check(self, recipe: Recipe) -> None:
        """No planned steps."""
        if recipe.unmask.clocked:
            raise InputError(
                f"the {recipe.unmask.type} policy plans the steps of a block, and a sliding window has none; give a "
                "number of tokens per step, or use fixed blocks"
            )

    def next(self, state: DecodeState) -> tuple[Tensor, Tensor]:
        """From the first mask on."""
        start, end = masked_span(state.masked)
        return start, torch.minimum(start + self.length, end)

    def count(self, state: DecodeState) -> Tensor:
        """One."""
        return torch.ones_like(state.first)
