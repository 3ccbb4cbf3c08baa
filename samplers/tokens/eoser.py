"""Less confidence in ends, at first."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import InputError
from .denoiser import Denoiser
from .slots import LOGITS, LogitsProcessor
from .state import Confidence, DecodeState


@LOGITS.register("eoser")
class EndSuppression(LogitsProcessor):
    """Confidence in a proposed end of sequence is scaled by a factor that rises evenly (EOSER, arXiv:2509.23924).

    It rises with the share of the answer that is committed, which is the share of the steps for equal quotas, over all
    blocks. The released code divides the step within the block by the steps of the whole answer, so that with several
    blocks it stays near its minimum. For ascending steps the paper starts at 0.01. Negative entropies are divided by
    the factor.
    """

    type: Literal["eoser"] = "eoser"
    least: float = Field(default=0.4, gt=0, le=1, description="Factor at the start.")
    most: float = Field(default=1.0, gt=0, le=1, description="Factor at the end.")

    def suits(self, denoiser: Denoiser) -> None:
        """There has to be such a token."""
        if not denoiser.spec.eos_ids:
            raise InputError("eoser needs an end-of-sequence token; give eos_ids in the denoiser's spec")

    def confidence(self, state: DecodeState, confidence: Tensor, kind: Confidence) -> Tensor:
        """Scaled where the proposal is an end."""
        factor = (self.least + (self.most - self.least) * state.progress)[:, None]
        ends = torch.isin(state.x0, torch.tensor(state.spec.eos_ids, device=state.x0.device)) & state.known
        return torch.where(ends, confidence / factor if kind == "entropy" else confidence * factor, confidence)
