"""Logits that are used again while nothing has changed."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..errors import InputError
from .denoiser import Denoiser, DenoiserSpec
from .slots import CACHES, CachePlan, TokenCache
from .state import DecodeState


@CACHES.register("output")
class OutputCache(TokenCache):
    """A row that the last step left as it was keeps its logits (MDLM, arXiv:2406.07524, and, by row, RADD, 2406.03736).

    Exact, as the denoiser is a function of the row's tokens. It pays with unmask policies that leave rows alone in
    some steps; one that commits in every step never meets the same row twice.
    """

    type: Literal["output"] = "output"
    keeps: ClassVar[Literal["nothing", "logits", "kv"]] = "logits"

    def suits(self, denoiser: Denoiser) -> None:
        """The time must not matter."""
        if denoiser.spec.time_conditioned:
            raise InputError(
                "the output cache reuses logits of an earlier time, and this denoiser is told the time; use cache none"
            )

    def plan(self, state: DecodeState) -> CachePlan:
        """Rows that changed, or that need logits which are not at hand."""
        fresh = state.changed.any(1) | (state.open & ~state.known).any(1)
        return CachePlan(query=state.reach(state.open) & fresh[:, None])

    def exactness(self, spec: DenoiserSpec) -> bool:
        """Exact for every denoiser that it suits."""
        return not spec.time_conditioned
