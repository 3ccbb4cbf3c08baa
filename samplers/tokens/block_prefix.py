"""Finished blocks of a block-causal denoiser."""

from __future__ import annotations

from typing import Literal

from .denoiser import DenoiserSpec
from .slots import CACHES, CachePlan, TokenCache
from .state import DecodeState


@CACHES.register("block-prefix")
class BlockPrefix(TokenCache):
    """Blocks of the attention that are finished are evaluated once more, with their tokens, and then never again.

    That is exact: a position of a block-causal denoiser depends on its own block and those before, so its keys and
    values change only when a token there does (BD3-LM, arXiv:2503.09573; Fast-dLLM v2, arXiv:2509.26328). The last
    evaluation of a block is part of the first step of the next one and costs no step of its own. With full attention
    everything depends on everything, and nothing is saved.
    """

    type: Literal["block-prefix"] = "block-prefix"

    def plan(self, state: DecodeState) -> CachePlan:
        """What is asked for, and all that it depends on and that is not up to date."""
        return CachePlan(query=state.sources(state.open) | (state.reach(state.open) & ~state.fresh))

    def exactness(self, spec: DenoiserSpec) -> bool:
        """Exact for every denoiser."""
        return True
