"""The part of the answer that is complete."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .blocks import masked_span
from .interval_cache import IntervalCache
from .slots import CACHES
from .state import DecodeState


@CACHES.register("free")
class FreeCache(IntervalCache):
    """FreeCache (FlashDLM, arXiv:2505.21467): prompt and answer before the first mask are never evaluated again.

    Everything from the beginning of the stretch of ``length`` positions with the first mask is evaluated in each step;
    a length of 1 keeps every token left of the first mask. Unlike upstream, a token is kept with keys and values that
    were computed with it in place, which takes one evaluation after its commit.
    """

    type: Literal["free"] = "free"
    length: int = Field(default=32, ge=1, description="Positions of the answer that are kept together.")
    refresh: int | None = Field(
        default=None, ge=1, description="Steps from one evaluation of everything to the next; none: only the first."
    )

    def full(self, state: DecodeState) -> Tensor:
        """By the row's steps: where a block begins makes no difference."""
        return state.step == 0 if self.refresh is None else state.step % self.refresh == 0

    def between(self, state: DecodeState) -> Tensor:
        """What is not complete."""
        begin, _ = masked_span(state.editable)
        mask, _ = masked_span(state.masked)
        boundary = begin + torch.div(mask - begin, self.length, rounding_mode="floor") * self.length
        return state.columns >= boundary[:, None]
