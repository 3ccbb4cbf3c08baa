"""An answer that is over when its end is committed."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import InputError
from .blocks import masked_span
from .denoiser import Denoiser
from .slots import EXITS, Exit
from .state import DecodeState


class EndExit(Exit):
    """What comes after the first end of sequence is not decoded.

    ``drop``: those positions cease to exist at once, so that they are neither evaluated nor attended to, which can
    change what is decoded before them (the idea of EoTP in Learn2PD, arXiv:2509.25188, without changing shapes).
    Otherwise the row goes on as it is until everything before the end is committed.
    """

    drop: bool = Field(default=False, description="Whether positions past the end cease to exist at once.")

    def suits(self, denoiser: Denoiser) -> None:
        """There has to be such a token."""
        if not denoiser.spec.eos_ids:
            raise InputError(
                f"the {self.type} exit needs an end-of-sequence token; give eos_ids in the denoiser's spec"
            )

    def ends(self, state: DecodeState) -> Tensor:
        """After the first committed end."""
        first, _ = masked_span(self.found(state) & state.editable & state.present)
        end = (first + 1).clamp(max=state.x.shape[1])
        if self.drop:
            return end
        mask, _ = masked_span(state.masked)
        return torch.where(first <= mask, end, state.end)

    def found(self, state: DecodeState) -> Tensor:
        """(B, L) bool, where there is an end: committed ones."""
        return torch.isin(state.x, torch.tensor(state.spec.eos_ids, device=state.x.device))


@EXITS.register("eos")
class EosExit(EndExit):
    """What comes after the first committed end of sequence is not decoded.

    With ``drop`` False the answer is the one without an exit.
    """

    type: Literal["eos"] = "eos"
