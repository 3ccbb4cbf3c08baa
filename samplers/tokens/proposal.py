"""The token that each known position would get."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .state import DecodeState


class Proposal(BaseModel):
    """The likeliest token, or one drawn from a tempered and filtered distribution.

    Sampling inverts the cumulative distribution in float64 with one number per position: the law of float64 Gumbel
    noise on logits / temperature, where single precision would cut the tails (MDLM's samplers do). What is drawn
    at a position does not depend on which other positions are known, so that caches cannot change it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(default=0.0, ge=0, description="0: the likeliest token.")
    top_k: int | None = Field(default=None, ge=1, description="Draw from the k likeliest tokens.")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Draw from the likeliest tokens that together have this probability."
    )

    def propose(self, state: DecodeState) -> Tensor:
        """(N,) int64, tokens at the known positions."""
        if self.temperature == 0:
            return state.logits.argmax(-1)
        uniform = 1 - state.uniform("proposal")[state.at]
        return draw(self.probs(state.logits), uniform)

    def probs(self, logits: Tensor) -> Tensor:
        """(N, V) float64, the law that tokens are drawn from; at temperature 0 all on the likeliest."""
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        probs = (logits.double() / self.temperature).softmax(-1)
        if self.top_k is None and self.top_p is None:
            return probs
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(ordered.shape[-1], device=ordered.device)
        kept = rank < (self.top_k or ordered.shape[-1])
        if self.top_p is not None:
            kept = kept & (ordered.cumsum(-1) - ordered < self.top_p)
        ordered = ordered * kept
        return torch.zeros_like(probs).scatter(-1, order, ordered / ordered.sum(-1, keepdim=True))


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Indices drawn from rows of probabilities by inversion.

    Args:
        probs: (N, V) float64, not necessarily normalised.
        uniform: (N,) float64 in (0, 1].

    Returns:
        (N,) int64, never one of probability 0.
    """
    cumulative = probs.cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return (cumulative < target).sum(-1)
