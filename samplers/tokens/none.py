"""The member of each slot that does nothing."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from .denoiser import DenoiserSpec
from .slots import (
    CACHES,
    CONSTRAINTS,
    EXITS,
    REMASKS,
    SCORERS,
    CachePlan,
    Choice,
    Constraint,
    Exit,
    Remask,
    Scorer,
    TokenCache,
    nothing_of,
)
from .state import DecodeState


@EXITS.register("none")
class NoExit(Exit):
    """A row is done when its last mask is committed."""

    type: Literal["none"] = "none"


@REMASKS.register("none")
class NoRemask(Remask):
    """What is committed stays."""

    type: Literal["none"] = "none"
    rewrites: ClassVar[bool] = False

    def select(self, state: DecodeState, committed: Tensor) -> Choice:
        """Nothing."""
        return nothing_of(state)


@CACHES.register("none")
class NoCache(TokenCache):
    """Every step evaluates whatever the open positions depend on.

    That is the whole canvas for a full-attention denoiser, and all blocks up to the active one for a block-causal one.
    """

    type: Literal["none"] = "none"
    keeps: ClassVar[Literal["nothing", "logits", "kv"]] = "nothing"

    def plan(self, state: DecodeState) -> CachePlan:
        """Everything that counts."""
        return CachePlan(query=state.reach(state.open))

    def exactness(self, spec: DenoiserSpec) -> bool:
        """Exact by definition."""
        return True


@CONSTRAINTS.register("none")
class NoConstraint(Constraint):
    """Every choice is allowed."""

    type: Literal["none"] = "none"


@SCORERS.register("none")
class NoScorer(Scorer):
    """Every choice is accepted."""

    type: Literal["none"] = "none"
