"""Steps in groups whose positions are chosen at once."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import InputError
from .denoiser import DenoiserSpec
from .interval_cache import needed
from .slots import CACHES, CachePlan, TokenCache, Unmask
from .state import DecodeState

if TYPE_CHECKING:
    from .recipe import Recipe


@CACHES.register("recap")
class Recap(TokenCache):
    """ReCAP for masked images (reusable contexts, github.com/liebenxj/ReCAP): groups of one full and some local steps.

    The full step evaluates everything and fixes the positions that the group will commit, by the confidences it has.
    The local steps evaluate these only and attend to the keys and values that the full step left. So it has to be
    known how many tokens the next steps take. The first steps, in which few tokens are there, are full ones.

    ``plain_steps`` and the groups count the steps of a block; the method was made for one block, the whole image.
    """

    type: Literal["recap"] = "recap"
    local_steps: int = Field(default=1, ge=0, description="Local steps of a group; 0 makes every step a full one.")
    plain_steps: int = Field(default=12, ge=0, description="Full steps before the first group.")

    def check(self, recipe: Recipe) -> None:
        """The unmask policy has to say how many."""
        if self.local_steps and type(recipe.unmask).quota is Unmask.quota:
            raise InputError(
                f"the recap cache fixes the positions of several steps at once, and the {recipe.unmask.type} policy "
                "does not know how many it will take; use a policy with a quota, or another cache"
            )

    def begin(self, state: DecodeState) -> None:
        """No group yet."""
        state.memory[self] = torch.zeros_like(state.known)

    def _full(self, state: DecodeState) -> Tensor:
        """(B,) bool, rows at a full step, also where a group has ended early."""
        since = state.block_step - self.plain_steps
        group: Tensor = state.memory[self]
        empty = ~(group & state.open).any(1)
        return (state.block_step == 0) | (since < 0) | (since % (1 + self.local_steps) == 0) | empty

    def plan(self, state: DecodeState) -> CachePlan:
        """Everything that counts, or the group."""
        group = state.memory[self] & ~self._full(state)[:, None]
        state.memory[self] = group
        return CachePlan(query=state.reach(state.open) & (group | needed(state) | ~group.any(1, keepdim=True)))

    def on_commit(self, state: DecodeState, changed: Tensor) -> None:
        """After the first step of a group: what it committed, and what its policy would take next."""
        group, ahead = changed.clone(), copy.copy(state)
        for _ in range(self.local_steps):
            ahead.step, ahead.block_step = ahead.step + 1, ahead.block_step + 1
            chosen = state.recipe.unmask.select(ahead) & ahead.candidates
            ahead.x = torch.where(chosen, state.x0, ahead.x)
            group = group | chosen
        first = (state.block_step >= self.plain_steps) & ~state.memory[self].any(1)
        state.memory[self] = torch.where(first[:, None], group, state.memory[self])

    def exactness(self, spec: DenoiserSpec) -> bool:
        """Exact without local steps."""
        return self.local_steps == 0
