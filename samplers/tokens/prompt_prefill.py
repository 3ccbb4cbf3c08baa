"""The prompt by itself, once."""

from __future__ import annotations

from typing import Literal

from .denoiser import DenoiserSpec
from .interval_cache import prompt_of
from .slots import CACHES, CachePlan, TokenCache
from .state import DecodeState


@CACHES.register("prompt-prefill")
class PromptPrefill(TokenCache):
    """The prompt is evaluated before the answer, seeing itself only, and never again (Dimple, arXiv:2505.16990, 4.2).

    The answer is evaluated in each step, with the last token of the prompt where logits are shifted, as that one
    predicts the first of the answer. A denoiser whose prompt sees the answer is asked something that it was not
    trained for.
    """

    type: Literal["prompt-prefill"] = "prompt-prefill"

    def plan(self, state: DecodeState) -> CachePlan:
        """The answer; the prompt is added when it has no keys and values yet."""
        prompt = prompt_of(state) & ~state.sources(state.editable & state.present)
        return CachePlan(query=state.reach(state.open) & ~prompt, visible=~(prompt[:, :, None] & ~prompt[:, None]))

    def exactness(self, spec: DenoiserSpec) -> bool:
        """Never claimed: ``block-prefix`` is exact where the prompt does not see the answer."""
        return False
