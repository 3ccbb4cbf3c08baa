"""All at once when the denoiser has made up its mind."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .slots import EXITS, Exit
from .state import DecodeState


@EXITS.register("prophet")
class Prophet(Exit):
    """Commits all masks once the mean gap of the two largest logits reaches a threshold (Prophet, arXiv:2508.19982).

    The threshold is that of the stage the row is in: progress, the share of its positions that are committed, has
    passed as many ``stages`` as thresholds are to be left behind; with one token per step that is the share of the
    steps. The mean is over masked positions, the only ones that the decision is about, where the released code looks at
    an answer's place that the user has to know. Thresholds are to be fitted for a denoiser.
    """

    type: Literal["prophet"] = "prophet"
    thresholds: tuple[float, float, float] = Field(default=(7.5, 5.0, 2.5), description="Of the mean gap, by stage.")
    stages: tuple[float, float] = Field(default=(0.33, 0.67), description="Progress at which the next one begins.")
    scope: Literal["answer", "block"] = Field(default="answer", description="Which masks are looked at and committed.")

    def wants(self, state: DecodeState) -> Tensor | None:
        """All masks that can be predicted, or those of the block alone."""
        return state.ahead if self.scope == "answer" else None

    def all_in(self, state: DecodeState) -> Tensor:
        """Where the gap is wide."""
        best = state.logits.topk(2).values.double()
        gap = state.spread(best[:, 0] - best[:, 1], 0.0)
        masks = state.masked & state.known
        mean = torch.where(masks, gap, 0.0).sum(1) / masks.sum(1).clamp(min=1)
        stages = torch.tensor(self.stages, device=mean.device, dtype=torch.float64)
        stage = (state.progress[:, None] >= stages).sum(1)
        return mean >= torch.tensor(self.thresholds, device=mean.device, dtype=torch.float64)[stage]
