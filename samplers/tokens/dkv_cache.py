"""Keys and values that are kept one step after their token came."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from .denoiser import DenoiserSpec
from .interval_cache import IntervalCache, prompt_of
from .slots import CACHES, CachePlan
from .state import DecodeState


@CACHES.register("dkv")
class DkvCache(IntervalCache):
    """dKV-Cache-Decode (arXiv:2505.15781): tokens keep their keys and values, masks never do.

    A position is evaluated in the step after its token was committed, with the token in place, and then kept: the
    delay of one step. The first two steps of a block and then every ``refresh``-th evaluate everything, as upstream
    does. Where logits are shifted, a position also stays in the evaluation until the next one has its token.

    ``keep_prompt`` is the variant PD: the prompt is evaluated in the first step of all and never again.
    """

    type: Literal["dkv"] = "dkv"
    refresh: int | None = Field(
        default=8,
        ge=1,
        description="Steps of a block from one evaluation of everything to the next; none: only where a block begins.",
    )
    keep_prompt: bool = Field(default=False, description="Whether the prompt is evaluated once and for all (PD).")

    def full(self, state: DecodeState) -> Tensor:
        """Also the second step of a block, for the prompt to see the first tokens."""
        return super().full(state) | (state.block_step == 1)

    def between(self, state: DecodeState) -> Tensor:
        """All masks."""
        return state.masked

    def plan(self, state: DecodeState) -> CachePlan:
        """Everything that counts, or what is between, without a prompt that is kept."""
        query = super().plan(state).query
        return CachePlan(query=query & ~(prompt_of(state) & state.stored) if self.keep_prompt else query)

    def exactness(self, spec: DenoiserSpec) -> bool:
        """Exact when every step evaluates everything."""
        return super().exactness(spec) and not self.keep_prompt
