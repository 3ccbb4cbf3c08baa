"""Tokens that each position may have."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import InputError
from .blocks import offsets
from .denoiser import Denoiser
from .language import check_final
from .recipe import Recipe
from .slots import CONSTRAINTS, Constraint
from .state import DecodeState


@CONSTRAINTS.register("allowed")
class Allowed(Constraint):
    """The tokens that each position of an answer may have, counted from a row's first mask.

    Positions do not depend on each other here, so that what is proposed is always allowed. What an exit drops behind an
    end-of-sequence token is filled with such tokens all the same. See the ban processor for tokens that are not to come
    anywhere, and dfa for patterns.
    """

    type: Literal["allowed"] = "allowed"
    tokens: tuple[tuple[int, ...], ...] = Field(
        min_length=1, description="Ids for each position; none: any. Positions past the last are free."
    )

    def check(self, recipe: Recipe) -> None:
        """Nothing may change an answer afterwards."""
        check_final(recipe, self.type)

    def suits(self, denoiser: Denoiser) -> None:
        """The ids are tokens that can be generated."""
        spec = denoiser.spec
        for position, tokens in enumerate(self.tokens):
            for token in tokens:
                if not 0 <= token < spec.vocab_size or token == spec.mask_id:
                    raise InputError(
                        f"position {position} allows token {token}; the denoiser generates tokens 0 to "
                        f"{spec.vocab_size - 1} without the mask, {spec.mask_id}"
                    )

    def begin(self, state: DecodeState) -> None:
        """Makes the table of what is refused: (positions + 1, V) bool."""
        refused = torch.zeros(len(self.tokens) + 1, state.spec.vocab_size, dtype=torch.bool, device=state.x.device)
        for position, tokens in enumerate(self.tokens):
            refused[position] = bool(tokens)
            refused[position, list(tokens)] = False
        state.memory[self] = refused

    def restrict(self, state: DecodeState, logits: Tensor) -> Tensor:
        """Minus infinity at what is not allowed."""
        position = offsets(state)[state.at].clamp(max=len(self.tokens))
        free = (position < 0) | ~state.masked[state.at]
        return logits.masked_fill(state.memory[self][position.clamp(min=0)] & ~free[:, None], -torch.inf)
