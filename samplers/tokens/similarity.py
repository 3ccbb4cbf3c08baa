"""The part of the answer that changes most."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from .denoiser import DenoiserSpec
from .interval_cache import needed, prompt_of
from .slots import CACHES, CachePlan, TokenCache
from .state import DecodeState, top


@CACHES.register("similarity")
class SimilarityCache(TokenCache):
    """dLLM-Cache (arXiv:2506.06295): prompt and answer in turns of their own, and between them what is least similar.

    The original compares values with stored ones in every layer and evaluates the share that changed most. Here a
    whole position is evaluated or not, so the comparison is the one made when it was evaluated last: the change of its
    values per step, times the steps since. Open positions and new tokens are always evaluated, the first because their
    logits are read, the second because nothing changes more; the share is one of the rest of the answer. Defaults are
    those of the authors' demonstration on LLaDA.
    """

    type: Literal["similarity"] = "similarity"
    prompt_refresh: int = Field(default=100, ge=1, description="Steps from one evaluation of the prompt to the next.")
    answer_refresh: int = Field(default=7, ge=1, description="Steps from one evaluation of the answer to the next.")
    share: float = Field(
        default=0.25, ge=0, le=1, description="Part of the rest of the answer that other steps evaluate."
    )

    def begin(self, state: DecodeState) -> None:
        """Nothing is known of how fast values change."""
        unknown = torch.full(state.x.shape, torch.inf, dtype=torch.float64, device=state.x.device)
        state.memory[self] = {"rate": unknown, "age": torch.zeros_like(state.x)}

    def plan(self, state: DecodeState) -> CachePlan:
        """By turns."""
        memory, age = state.memory[self], state.age.clamp(min=1)
        change = state.drift.double() / memory["age"].clamp(min=1)
        memory["rate"] = torch.where(memory["age"] > 0, change, memory["rate"])
        prompt = prompt_of(state)
        query = state.open | needed(state)
        query = query | (prompt & (state.step % self.prompt_refresh == 0)[:, None])
        query = query | (~prompt & (state.step % self.answer_refresh == 0)[:, None])
        rest = state.present & ~prompt & ~query
        query = query | top(memory["rate"] * age, rest, (rest.sum(1) * self.share).floor().long())
        memory["age"] = torch.where(query & state.stored & ~state.stale, age, 0)
        return CachePlan(query=state.reach(state.open) & query, probe=True)

    def exactness(self, spec: DenoiserSpec) -> bool:
        """Exact when every step evaluates everything."""
        return self.prompt_refresh == 1 and self.answer_refresh == 1
