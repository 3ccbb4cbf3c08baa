"""Each mask by chance, at the rate of the forward process."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from .slots import UNMASKS, Remask, Unmask
from .state import DecodeState


class RateRemask(Remask):
    """A remask policy that shares the clock of ancestral sampling, so that the two have one law."""

    @abstractmethod
    def reveal(self, state: DecodeState, time: Tensor, after: Tensor) -> Tensor:
        """(B, 1) or (B, L), the chance that a mask is committed between two times.

        Args:
            state: of the decoding.
            time: (B, 1) float64, t.
            after: (B, 1) float64, s < t.
        """


@UNMASKS.register("ancestral")
class Ancestral(Unmask):
    """Each open position with probability (t - s) / t between times t and s of an even grid from 1 to 0.

    The reverse process of masked diffusion with the log-linear schedule (MDLM, arXiv:2406.07524, and RADD, 2406.03736,
    whose Tweedie and Euler rates are both this one). Draw tokens at temperature 1. The grid ends at 0, where all that
    is left is drawn, instead of at 1e-5 with the likeliest tokens. Each block has a grid of its own. With the output
    cache a row of n tokens takes T (1 - (1 - 1/T)^n) evaluations on average.
    """

    type: Literal["ancestral"] = "ancestral"
    paced: ClassVar[bool] = True
    steps: int = Field(default=128, ge=1, description="Of each block.")

    @property
    def clocked(self) -> bool:
        """The grid is the block's."""
        return True

    def limit(self, generated: int) -> int:
        """All steps of as many blocks as there can be."""
        return self.steps * generated

    def time(self, state: DecodeState) -> Tensor:
        """t, at the start of the step."""
        return 1 - (state.block_step / self.steps).double().clamp(max=1)

    def times(self, state: DecodeState) -> tuple[Tensor, Tensor]:
        """(B, 1) t and s of this step."""
        left = (self.steps - state.block_step[:, None]).clamp(min=0).double()
        return left / self.steps, (left - 1).clamp(min=0) / self.steps

    def select(self, state: DecodeState) -> Tensor:
        """By chance; in the last step all."""
        time, after = self.times(state)
        remask = state.recipe.remask
        rate = remask.reveal(state, time, after) if isinstance(remask, RateRemask) else (time - after) / time
        rate = torch.where(after > 0, rate, 1.0)
        return state.candidates & (state.uniform("selection") < rate)
