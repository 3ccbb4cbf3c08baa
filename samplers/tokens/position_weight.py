"""The surest and leftmost first."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import InputError
from .blocks import offsets
from .quota import EvenQuota
from .slots import UNMASKS
from .state import DecodeState, top

RESOURCE = "token-frequencies"
"""(V,) share of each token in a corpus."""


@UNMASKS.register("pc")
class PositionWeighted(EvenQuota):
    """A quota of the largest exp(-decay i) c, i counted from the start of the answer (PC-Sampler, arXiv:2508.13021).

    c is the confidence. With ``calibrated`` it is multiplied by -log q of the proposed token, at most ``clip``, where q
    is how often it occurs in a corpus: the tensor (V,) that ``decode`` gets as resource "token-frequencies". Common
    tokens then count less.
    """

    type: Literal["pc"] = "pc"
    decay: float = Field(default=0.25, ge=0, description="Per position; 0 is no weight.")
    calibrated: bool = Field(default=False, description="Whether frequencies of tokens are counted in.")
    clip: float = Field(default=10.0, gt=0, description="Largest -log frequency, in nats.")

    def select(self, state: DecodeState) -> Tensor:
        """The best by weight and confidence."""
        confidence = state.confidence(self.confidence)
        if self.confidence == "entropy":
            confidence = confidence.exp()
        scores = confidence * torch.exp(-self.decay * offsets(state).clamp(min=0).double())
        if self.calibrated:
            rarity = -self._frequencies(state).log()
            scores = scores * rarity.clamp(max=self.clip)[state.x0.clamp(max=state.spec.vocab_size - 1)]
        return top(scores, state.candidates, self.quota(state))

    def _frequencies(self, state: DecodeState) -> Tensor:
        shares = torch.as_tensor(state.resource(f"{self.type} policy", RESOURCE), dtype=torch.float64)
        if shares.shape != (state.spec.vocab_size,) or not bool(((shares >= 0) & (shares <= 1)).all()):
            raise InputError(
                f"{RESOURCE} has to be {state.spec.vocab_size} shares between 0 and 1; got a tensor of shape "
                f"{tuple(shares.shape)}"
            )
        return shares.to(state.x.device)
