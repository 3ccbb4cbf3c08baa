"""One token at a time, at the times at which ancestral sampling would hit them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .slots import UNMASKS, Unmask
from .state import DecodeState, top


@UNMASKS.register("first-hitting")
class FirstHitting(Unmask):
    """One random open position per step (first-hitting sampler, arXiv:2409.02908; BD3-LM, 2503.09573).

    The law of ancestral sampling in infinitely many steps, in as many evaluations as there are tokens; draw tokens at
    temperature 1. With n masks left the time goes from t to t u^(1/n), u uniform, and the denoiser is told that time,
    if it wants one. Each block has a time of its own that starts at 1.
    """

    type: Literal["first-hitting"] = "first-hitting"

    @property
    def clocked(self) -> bool:
        """The time is the block's."""
        return True

    def begin(self, state: DecodeState) -> None:
        """Time 1, before the first step."""
        state.memory[self] = (-1, torch.ones(len(state.first), dtype=torch.float64, device=state.x.device))

    def quota(self, state: DecodeState) -> Tensor:
        """One."""
        return torch.ones_like(state.first)

    def select(self, state: DecodeState) -> Tensor:
        """Any."""
        return top(state.confidence("random"), state.candidates, self.quota(state))

    def time(self, state: DecodeState) -> Tensor:
        """The time at which the next position is hit; drawn once in each step."""
        memory: tuple[int, Tensor] = state.memory[self]
        iteration, time = memory
        now = int(state.step.max())
        if now != iteration:
            uniform = 1 - state.uniform("selection")[:, -1]
            time = torch.where(state.block_step == 0, 1.0, time)
            time = time * uniform ** (1 / state.open.sum(1).clamp(min=1))
            state.memory[self] = (now, time)
        return time
