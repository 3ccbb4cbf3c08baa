"""An autoregressive model that says how many of the drafts can be committed together."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..errors import InputError
from .causal import reader_of
from .left_to_right import check_left_to_right, check_masks_last, leading
from .recipe import Recipe
from .slots import SCORERS, Choice, Scorer
from .state import DecodeState


@SCORERS.register("guider")
class Guider(Scorer):
    """Guided diffusion (FlashDLM, arXiv:2505.21467): the drafts up to the first that the guider would not write.

    A draft passes if it is among the guider's ``top_k`` tokens, is at least ``relative`` times as probable as the
    likeliest one, and has at least probability ``threshold``, as far as these are given. ``top_k=1`` is the
    deterministic rule, ``top_k=2, relative=0.5`` the relative one. The guider gates and does not write: if it refuses
    the first draft, that one is committed alone. Drafts are as many as the unmask policy takes from the left.
    """

    type: Literal["guider"] = "guider"
    top_k: int | None = Field(default=None, ge=1, description="Rank that a draft needs with the guider.")
    relative: float | None = Field(default=None, gt=0, le=1, description="Share of the largest probability it needs.")
    threshold: float | None = Field(default=None, gt=0, le=1, description="Probability it needs.")

    @model_validator(mode="after")
    def _some_rule(self) -> Guider:
        if self.top_k is None and self.relative is None and self.threshold is None:
            raise ValueError("a guider accepts by top_k, relative or threshold; give at least one (top_k=1: its own)")
        return self

    def check(self, recipe: Recipe) -> None:
        """Drafts are the next tokens."""
        check_left_to_right(recipe, self.type)
        if recipe.constraint.type != "none":
            raise InputError(
                f"the {recipe.constraint.type} constraint takes drafts back that the guider needs in a row; use one of "
                "the two"
            )

    def begin(self, state: DecodeState) -> None:
        """Opens the model."""
        check_masks_last(state, self.type)
        state.memory[self] = reader_of(state, self.type)

    def accept(self, state: DecodeState, choice: Choice) -> Choice:
        """The prefix that passes, or the first draft."""
        drafted = leading(state, choice)
        later = drafted & (drafted.long().cumsum(1) > 1)
        asked = drafted & later.any(1, keepdim=True)
        tokens = torch.where(drafted, choice.tokens, state.x)
        probs = state.memory[self].read(state, tokens, asked).double().softmax(-1)
        stop = torch.zeros_like(drafted)
        stop[asked] = ~self._passes(probs, tokens[asked])
        kept = drafted & ((stop.long().cumsum(1) == 0) | ~later)
        return Choice(kept, choice.tokens, choice.failed)

    def _passes(self, probs: Tensor, tokens: Tensor) -> Tensor:
        """(N,) bool."""
        own = probs.gather(1, tokens[:, None])
        passes = torch.ones_like(own[:, 0], dtype=torch.bool)
        if self.top_k is not None:
            passes &= (probs > own).sum(1) < self.top_k
        if self.relative is not None:
            passes &= own[:, 0] >= self.relative * probs.amax(1)
        if self.threshold is not None:
            passes &= own[:, 0] >= self.threshold
        return passes
