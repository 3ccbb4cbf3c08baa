"""Caches that evaluate everything once in a while."""

from __future__ import annotations

from abc import abstractmethod

from pydantic import Field
from torch import Tensor

from .denoiser import DenoiserSpec
from .slots import CachePlan, TokenCache
from .state import DecodeState


def prompt_of(state: DecodeState) -> Tensor:
    """(B, L) bool, the positions that are given."""
    return state.present & ~state.editable


def needed(state: DecodeState) -> Tensor:
    """(B, L) bool, tokens whose keys and values are those of a mask, and tokens whose logits are asked for."""
    return state.stale | (state.open & ~state.masked)


class IntervalCache(TokenCache):
    """Everything where a block begins and then every ``refresh`` steps of it, and something less between.

    Tokens that came since they were evaluated are always evaluated, wherever they are. The evaluation of everything is
    an ordinary step: it gives the logits that this step commits by.
    """

    refresh: int | None = Field(
        default=None,
        ge=1,
        description="Steps of a block from one evaluation of everything to the next; none: only where a block begins.",
    )

    @abstractmethod
    def between(self, state: DecodeState) -> Tensor:
        """(B, L) bool, what the other steps evaluate."""

    def full(self, state: DecodeState) -> Tensor:
        """(B,) bool, rows that evaluate everything."""
        begins = state.block_step == 0
        return begins if self.refresh is None else begins | (state.block_step % self.refresh == 0)

    def plan(self, state: DecodeState) -> CachePlan:
        """Everything that counts, or what is between and what every step needs."""
        query = self.full(state)[:, None] | self.between(state) | needed(state)
        return CachePlan(query=state.reach(state.open) & query)

    def exactness(self, spec: DenoiserSpec) -> bool:
        """Exact when every step evaluates everything."""
        return self.refresh == 1
