"""A block of the attention in smaller ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .interval_cache import IntervalCache, needed
from .slots import CACHES, CachePlan
from .state import DecodeState


@CACHES.register("sub-block")
class SubBlockCache(IntervalCache):
    """Finished blocks stay, and within a block all but the active sub-block (Fast-dLLM v2, arXiv:2509.26328).

    Sub-blocks are those of the block schedule, such as ``nested``; blocks are those of the denoiser's
    attention. A step evaluates the whole block while the first position of the sub-block is masked, as upstream does,
    and else the sub-block alone. Finished blocks are exact; the rest of the block, which may have seen masks where
    there are tokens now, is not. With full attention everything is one block.
    """

    type: Literal["sub-block"] = "sub-block"

    def between(self, state: DecodeState) -> Tensor:
        """The sub-block, and everything else of its block while the first position is masked."""
        start = state.block_start.clamp(max=state.x.shape[1] - 1)[:, None]
        return state.in_block | state.masked.gather(1, start)

    def plan(self, state: DecodeState) -> CachePlan:
        """Within the block, and what is not up to date before it."""
        blocks = state.model_blocks
        start = state.block_start.clamp(max=state.x.shape[1] - 1)[:, None]
        inside = blocks >= blocks.gather(1, start)
        evaluated = self.full(state)[:, None] | self.between(state)
        query = torch.where(inside, evaluated, ~state.fresh) | needed(state)
        return CachePlan(query=state.reach(state.open) & query)
