"""The block in every step, the prompt and the rest of the answer when they have changed."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .denoiser import DenoiserSpec
from .interval_cache import needed, prompt_of
from .slots import CACHES, CachePlan, TokenCache
from .state import DecodeState, top

_GOLDEN = 0.6180339887498949
"""Multiples of it, without their whole parts, lie evenly however many they are."""


@CACHES.register("refresh")
class Refresh(TokenCache):
    """The active block and new tokens in every step; the prompt at an interval of its own, or when it has drifted.

    Caches that freeze the prompt are as good as none on tasks where answers copy from it, and fail on tasks where the
    prompt's keys and values carry what has been used up. Here the prompt and the rest of the answer are two parts that
    are evaluated again independently of each other, each position when it is as old as the interval of its part.

    With ``drift_limit`` there is a probe: of each part some positions are evaluated in every step, the oldest first
    and spread evenly, and their values compared with the stored ones. Where one has changed by more than the limit,
    |new - old| / |old| on average over layers, the next step evaluates that part of that row. What it evaluates is
    compared as well, so that a part which keeps changing is evaluated in every step, and one that has settled is left
    alone again.
    """

    type: Literal["refresh"] = "refresh"
    prompt_refresh: int | None = Field(
        default=1, ge=1, description="Steps after which a position of the prompt is evaluated again; none: by drift."
    )
    answer_refresh: int | None = Field(
        default=None, ge=1, description="The same for the answer outside the active block; none: by drift."
    )
    answer_at_block: bool = Field(default=True, description="Whether a block begins with the whole answer.")
    drift_limit: float | None = Field(
        default=None, ge=0, description="Relative change of values above which a part is evaluated; none: no probe."
    )
    probes: int = Field(default=4, ge=1, description="Positions of each part that the probe evaluates in a step.")

    @model_validator(mode="after")
    def _not_frozen(self) -> Refresh:
        if self.prompt_refresh is None and self.drift_limit is None:
            raise ValueError("without prompt_refresh and drift_limit the prompt stays frozen; give one of them")
        return self

    def begin(self, state: DecodeState) -> None:
        """Nothing has been compared yet."""
        state.memory[self] = torch.zeros_like(state.known)

    def plan(self, state: DecodeState) -> CachePlan:
        """The block, new tokens, and what is due of either part."""
        prompt = prompt_of(state)
        rest = state.editable & state.present & ~state.in_block
        query = state.in_block | needed(state)
        query = query | self._due(state, prompt, self.prompt_refresh) | self._due(state, rest, self.answer_refresh)
        if self.answer_at_block:
            query = query | (rest & (state.block_step == 0)[:, None])
        if self.drift_limit is None:
            return CachePlan(query=state.reach(state.open) & query)
        reach = state.reach(state.open)
        for part in (prompt, rest):
            query = query | self._sample(state, part & reach & ~query)
        state.memory[self] = query & reach & (prompt | rest) & state.stored & ~state.stale
        return CachePlan(query=query & reach, probe=True)

    def _due(self, state: DecodeState, part: Tensor, every: int | None) -> Tensor:
        """(B, L) bool, what of ``part`` is old, or all of it in rows where it has drifted."""
        due = torch.zeros_like(part) if every is None else part & (state.age >= every)
        if self.drift_limit is None:
            return due
        compared: Tensor = state.memory[self]
        drifted = (part & compared & (state.drift > self.drift_limit)).any(1, keepdim=True)
        return due | (part & drifted)

    def _sample(self, state: DecodeState, part: Tensor) -> Tensor:
        """(B, L) bool, ``probes`` positions of ``part``: the oldest, and of equal ones some that lie far apart.

        The order depends on the row alone and takes nothing from its random streams.
        """
        spread = (part.long().cumsum(1).double() * _GOLDEN).frac()
        return top(state.age + spread, part, torch.full_like(state.first, self.probes))

    def exactness(self, spec: DenoiserSpec) -> bool:
        """Exact when every step evaluates everything."""
        return self.prompt_refresh == 1 and self.answer_refresh == 1
