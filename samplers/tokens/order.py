"""An order that is fixed before anything is evaluated."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .slots import UNMASKS, Unmask
from .state import DecodeState, top


@UNMASKS.register("order")
class Order(Unmask):
    """A fixed number of open positions per step, in an order that is drawn at random or goes from left to right.

    The random one has the law of a quota at random, but is known in advance.
    """

    type: Literal["order"] = "order"
    tokens: int = Field(default=1, ge=1, description="Tokens per step.")
    random: bool = Field(default=True, description="Whether the order is drawn; otherwise from left to right.")

    def begin(self, state: DecodeState) -> None:
        """Draws the order."""
        rank = -state.columns.expand_as(state.x).double()
        state.memory[self] = state.uniform("selection") if self.random else rank

    def ahead(self, state: DecodeState) -> Tensor:
        """The next open positions of the order."""
        return top(state.memory[self], state.open & state.masked, torch.full_like(state.first, self.tokens))

    def quota(self, state: DecodeState) -> Tensor:
        """(B,) tokens of this step."""
        return torch.full_like(state.first, self.tokens)

    def select(self, state: DecodeState) -> Tensor:
        """Those of the next that are known."""
        return top(state.memory[self], state.candidates, self.quota(state))
