"""Tokens that are taken back by chance."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..errors import InputError
from .ancestral import Ancestral, RateRemask
from .recipe import Recipe
from .slots import REMASKS, Choice
from .state import DecodeState

Rule = Literal["cap", "rescale", "conf", "loop"]


@REMASKS.register("remdm")
class ReMDM(RateRemask):
    """A committed token becomes a mask again with probability sigma (ReMDM, arXiv:2503.00307).

    From time t to s, with a(t) = 1 - t tokens of a clean sequence visible and m = min(1, (1 - a(s)) / a(t)):

    * cap: sigma = min(eta, m);
    * rescale: sigma = eta m;
    * conf: sigma_i = m softmax(-p_i) over committed tokens, p_i the probability at which token i was committed;
    * loop: none until time ``on``, then sigma = eta at a(t) = ``alpha_on`` until time ``off``, then none again. Before
      and after, a(t) goes evenly from 0 to alpha_on and from there to 1.

    A mask is committed with probability (a(s) - (1 - sigma) a(t)) / (1 - a(t)), which keeps the share of masks that
    ancestral sampling has; under conf, as in the released code, with sigma 0. A row goes on to the last time even when
    no mask is left on the way. More evaluations, better samples: nothing here is faster. The released nucleus drops the
    token that crosses ``top_p``; ours keeps it.
    """

    type: Literal["remdm"] = "remdm"
    rule: Rule = Field(description="cap, rescale, conf or loop.")
    eta: float | None = Field(
        default=None, ge=0, le=1, description="None: 0.008 for cap, 0.015 for rescale, 0.02 for loop."
    )
    on: float = Field(default=0.55, gt=0, lt=1, description="Time at which the loop begins.")
    off: float = Field(default=0.05, gt=0, lt=1, description="Time at which it ends.")
    alpha_on: float = Field(default=0.9, gt=0, lt=1, description="Share of visible tokens in the loop.")

    @model_validator(mode="after")
    def _in_order(self) -> ReMDM:
        if self.off >= self.on:
            raise ValueError(f"time goes from 1 to 0, so that off has to be below on; got {self.off} and {self.on}")
        if self.rule == "conf" and self.eta is not None:
            raise ValueError("the conf rule has no eta")
        return self

    def check(self, recipe: Recipe) -> None:
        """The rates are those of ancestral sampling."""
        _clock(recipe)

    def visible(self, time: Tensor) -> Tensor:
        """a(t)."""
        if self.rule != "loop":
            return 1 - time
        rising = (1 - time) * self.alpha_on / (1 - self.on)
        last = 1 - time * (1 - self.alpha_on) / self.off
        return torch.where(time > self.on, rising, torch.where(time > self.off, self.alpha_on, last))

    def reveal(self, state: DecodeState, time: Tensor, after: Tensor) -> Tensor:
        """(B, 1), the chance that a mask is committed."""
        now = self.visible(time)
        sigma = torch.zeros_like(now) if self.rule == "conf" else self._sigma(time, after)
        return ((self.visible(after) - (1 - sigma) * now) / (1 - now)).clamp(0, 1)

    def select(self, state: DecodeState, committed: Tensor) -> Choice:
        """Each committed token of the block by chance."""
        time, after = _clock(state.recipe).times(state)
        shown = state.in_block & state.editable & state.present & (state.x != state.spec.mask_id) & ~committed
        sigma = self._sigma(time, after)
        if self.rule == "conf":
            sigma = sigma * (-state.reveal_conf).masked_fill(~shown, -torch.inf).softmax(1)
        taken = shown & (state.uniform("remask") < sigma)
        return Choice(taken, torch.full_like(state.x, state.spec.mask_id))

    def holds(self, state: DecodeState) -> Tensor:
        """Until the last step."""
        return state.block_step + 1 < _clock(state.recipe).steps

    def _sigma(self, time: Tensor, after: Tensor) -> Tensor:
        """(B, 1); under conf what is to be shared out."""
        largest = ((1 - self.visible(after)) / self.visible(time)).clamp(max=1)
        if self.rule == "conf":
            return largest
        if self.rule == "rescale":
            return (0.015 if self.eta is None else self.eta) * largest
        eta = self.eta if self.eta is not None else (0.008 if self.rule == "cap" else 0.02)
        sigma = largest.clamp(max=eta)
        if self.rule == "cap":
            return sigma
        return torch.where((time > self.off) & (time <= self.on), sigma, 0.0)


def _clock(recipe: Recipe) -> Ancestral:
    if not isinstance(recipe.unmask, Ancestral):
        raise InputError(
            f"the remdm policy takes tokens back at the rates of ancestral sampling, not of {recipe.unmask.type}; "
            "use unmask ancestral"
        )
    return recipe.unmask
