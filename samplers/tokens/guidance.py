"""Classifier-free guidance of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from .slots import LOGITS, LogitsProcessor
from .state import DecodeState


@LOGITS.register("cfg")
class TokenGuidance(LogitsProcessor):
    """g of uncond + g (cond - uncond), on logits (LLaDA, arXiv:2502.09992, appendix A.2; its w is g - 1).

    The branch without condition sees the unconditional tensors of ``decode(..., uncond=...)``, or, where there are
    none, masks in the place of the prompt. It costs one more evaluation per step.
    """

    type: Literal["cfg"] = "cfg"
    scale: float = Field(gt=0, description="g; 1 is no guidance.")
    branches: ClassVar[tuple[str, ...]] = ("uncond",)

    def branch_tokens(self, state: DecodeState, name: str) -> Tensor:
        """Masks in place of the prompt, unless there are unconditional tensors."""
        if state.uncond:
            return state.x
        return torch.where(state.editable, state.x, state.spec.mask_id)

    def branch_cond(self, state: DecodeState, name: str) -> Mapping[str, Tensor]:
        """The unconditional tensors, where there are some."""
        return {**state.cond, **state.uncond}

    def process(self, state: DecodeState, logits: Tensor) -> Tensor:
        """The guided logits."""
        uncond = state.branches["uncond"]
        return uncond + self.scale * (logits - uncond)
