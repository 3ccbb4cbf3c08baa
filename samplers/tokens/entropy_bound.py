"""As many as an error budget allows."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .slots import UNMASKS, Unmask
from .state import DecodeState, top


@UNMASKS.register("entropy-bound")
class EntropyBound(Unmask):
    """The surest open positions whose errors sum to at most the bound (EB-Sampler, arXiv:2505.24857).

    The error of a position is its entropy in nats, or 1 less another confidence. Of the sum the largest error is taken
    off, as one token alone makes no error of independence: an uncertain token rides along with certain ones. ``strict``
    leaves it in. Entropies are those of the untempered law, of open positions only. The default bound is
    DiffusionGemma's; 0.01 is in use for LLaDA.
    """

    type: Literal["entropy-bound"] = "entropy-bound"
    bound: float = Field(default=0.1, ge=0, description="Largest sum of errors; nats for entropies.")
    strict: bool = Field(default=False, description="Whether the largest error counts too.")
    error: Literal["entropy", "prob", "margin"] = Field(
        default="entropy", description="Entropy, 1 - probability, or 1 - margin."
    )

    def select(self, state: DecodeState) -> Tensor:
        """Those within the bound, and the surest."""
        confidence = state.confidence(self.error)
        error = -confidence if self.error == "entropy" else 1 - confidence
        ordered = error.masked_fill(~state.candidates, torch.inf).sort(dim=1).values
        total = ordered.cumsum(1)
        if not self.strict:
            total = torch.nn.functional.pad(total[:, :-1], (1, 0))
        within = (total <= self.bound) & ordered.isfinite()
        return top(confidence, state.candidates, within.sum(1).clamp(min=1))
