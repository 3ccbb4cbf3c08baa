"""Tokens that are allowed, or not."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..errors import InputError
from .denoiser import Denoiser
from .slots import LOGITS, LogitsProcessor
from .state import DecodeState


@LOGITS.register("ban")
class Ban(LogitsProcessor):
    """Only some tokens can be generated: those in ``allowed``, or all but those in ``banned``.

    LLaDA's ``logits_eos_inf`` is ``banned=(eos,)``.
    """

    type: Literal["ban"] = "ban"
    allowed: tuple[int, ...] | None = Field(default=None, min_length=1, description="Ids; none: all.")
    banned: tuple[int, ...] = Field(default=(), description="Ids.")

    @model_validator(mode="after")
    def _something(self) -> Ban:
        if self.allowed is None and not self.banned:
            raise ValueError("a ban names allowed or banned tokens")
        return self

    def suits(self, denoiser: Denoiser) -> None:
        """The ids are tokens, and some token is left."""
        size = denoiser.spec.vocab_size
        for token in (*(self.allowed or ()), *self.banned):
            if not 0 <= token < size:
                raise InputError(f"the ban names token {token}; the denoiser predicts tokens 0 to {size - 1}")
        left = set(self.allowed or range(size)) - set(self.banned) - {denoiser.spec.mask_id}
        if not left:
            raise InputError("the ban leaves no token that could be generated; allow one besides the mask")

    def process(self, state: DecodeState, logits: Tensor) -> Tensor:
        """Minus infinity at what is not allowed."""
        refused = torch.full(logits.shape[-1:], self.allowed is not None, dtype=torch.bool, device=logits.device)
        if self.allowed is not None:
            refused[list(self.allowed)] = False
        refused[list(self.banned)] = True
        return logits.masked_fill(refused, -torch.inf)
