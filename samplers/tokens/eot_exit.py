"""An answer that is over when its end is foreseen."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from .eos_exit import EndExit
from .slots import EXITS
from .state import DecodeState


@EXITS.register("eot")
class EotExit(EndExit):
    """What comes after the first foreseen end of sequence is not decoded (EoTP in Learn2PD, arXiv:2509.25188).

    An end is foreseen at a mask where one of the end-of-sequence tokens has at least the threshold's probability; it
    need not be committed. The released code has no threshold, so that one early guess cuts the answer, and shortens
    the tensor; here shapes stay. ``drop`` False has the row go on as it is until all before the end is committed.
    """

    type: Literal["eot"] = "eot"
    drop: bool = Field(default=True, description="Whether positions past the end cease to exist at once.")
    threshold: float = Field(default=0.9, gt=0, le=1, description="Probability of the end.")

    def wants(self, state: DecodeState) -> Tensor:
        """All masks that can be predicted."""
        return state.ahead

    def found(self, state: DecodeState) -> Tensor:
        """Committed ends and foreseen ones."""
        eos = state.log_probs[:, list(state.spec.eos_ids)].amax(1).exp().double()
        foreseen = state.masked & (state.spread(eos, -1.0) >= self.threshold)
        return super().found(state) | foreseen
