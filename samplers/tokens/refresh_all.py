"""Everything through the store, and nothing from it."""

from __future__ import annotations

from typing import Literal

from .denoiser import DenoiserSpec
from .slots import CACHES, CachePlan, TokenCache
from .state import DecodeState


@CACHES.register("refresh-all")
class RefreshAll(TokenCache):
    """Everything through the store of keys and values, and everything anew in every step: what checks the plumbing."""

    type: Literal["refresh-all"] = "refresh-all"

    def plan(self, state: DecodeState) -> CachePlan:
        """Everything that counts."""
        return CachePlan(query=state.reach(state.open))

    def exactness(self, spec: DenoiserSpec) -> bool:
        """Exact: no key or value is used twice."""
        return True
