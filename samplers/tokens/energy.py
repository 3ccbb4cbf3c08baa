"""Completions that an autoregressive model chooses among."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..errors import InputError
from .causal import reader_of
from .left_to_right import places
from .proposal import draw
from .recipe import Recipe
from .slots import SCORERS, Choice, Scorer
from .state import DecodeState


@SCORERS.register("energy")
class Energy(Scorer):
    """Self-normalised importance sampling of EDLM (arXiv:2410.21357, algorithm 1, with the autoregressive energy).

    In a step, k completions of all masks are drawn from the denoiser's marginals q; one of them is taken with
    probability in proportion to exp(-E / temperature), E = -log p(x) + log q(x) with the autoregressive model's p, and
    what the step commits comes from it. Low energy is likely here, as in the paper (the sign of the released sampler is
    the opposite). p is that of the whole row from its first mask on: visible tokens after a mask count, as their
    probability depends on what was drawn before them; with many completions the law is p's given what is visible.

    Completions are weighed while the masked share is between ``end`` and ``start``, the defaults being those of the
    released configuration; outside, the first one is taken unweighed. It costs k passes of the model per weighed step.
    Where some masks have no logits at hand, as under a cache, completions are compared up to the first of these.
    """

    type: Literal["energy"] = "energy"
    samples: int = Field(default=2, ge=2, description="Completions k.")
    temperature: float = Field(default=1.0, gt=0, description="Of the choice among them.")
    start: float = Field(default=0.6, ge=0, le=1, description="Largest masked share at which completions are weighed.")
    end: float = Field(default=0.4, ge=0, le=1, description="Smallest one.")

    @model_validator(mode="after")
    def _window(self) -> Energy:
        if self.end > self.start:
            raise ValueError(f"completions are weighed from start down to end; got start {self.start} < end {self.end}")
        return self

    def check(self, recipe: Recipe) -> None:
        """There have to be different completions, and nothing that decided on the first."""
        if recipe.propose.temperature == 0:
            raise InputError(
                "the energy scorer chooses among completions, which are all the same at temperature 0; give "
                "propose a temperature, such as 1"
            )
        if recipe.constraint.type != "none":
            raise InputError(
                f"the energy scorer takes other completions than the {recipe.constraint.type} constraint has seen; use "
                "one of the two"
            )

    def begin(self, state: DecodeState) -> None:
        """Opens the model for k sequences per row."""
        state.memory[self] = reader_of(state, self.type, self.samples)

    def wants(self, state: DecodeState) -> Tensor:
        """All masks that the denoiser evaluates anyway."""
        return state.masked & state.reach(state.open)

    def accept(self, state: DecodeState, choice: Choice) -> Choice:
        """The choice, with tokens of the completion that is taken."""
        uniforms = [1 - state.uniform("proposal") for _ in range(self.samples - 1)]
        pick = (1 - state.uniform("selection")).gather(1, state.first[:, None])
        time = state.masked.sum(1) / state.editable.sum(1).clamp(min=1)
        weighed = state.alive & choice.select.any(1) & (time >= self.end) & (time <= self.start)
        if not bool(weighed.any()):
            return choice
        filled = state.masked & state.known & weighed[:, None]
        law = state.recipe.propose.probs(state.logits)[places(state, filled)]
        drawn = [torch.where(filled, choice.tokens, state.x)]
        drawn += [state.x.masked_scatter(filled, draw(law, uniform[filled])) for uniform in uniforms]
        completions = torch.stack(drawn, dim=1)
        masks = state.masked.long().cumsum(1)
        known = (state.masked & ~state.known).long().cumsum(1) == 0
        compared = (masks > 0) & known & state.present & weighed[:, None]
        log_q = torch.stack(
            [_scattered(law.gather(1, tokens[filled][:, None])[:, 0].log(), filled) for tokens in drawn], dim=1
        )
        log_q = (log_q * compared[:, None]).sum(2)
        log_weights = (self._log_p(state, completions, compared) - log_q) / self.temperature
        index = draw(log_weights.softmax(1), pick[:, 0])
        taken = completions.gather(1, index[:, None, None].expand(-1, 1, completions.shape[2]))[:, 0]
        return Choice(choice.select, torch.where(filled, taken, choice.tokens), choice.failed)

    def _log_p(self, state: DecodeState, completions: Tensor, compared: Tensor) -> Tensor:
        """(B, k) float64, log-probability of what is compared."""
        wanted = compared[:, None].expand_as(completions).flatten(0, 1)
        tokens = completions.flatten(0, 1)
        logits = state.memory[self].read(state, tokens, wanted).double()
        log_p = logits.log_softmax(-1).gather(1, tokens[wanted][:, None])[:, 0]
        return _scattered(log_p.clamp(min=-1e30), wanted).sum(1).view(-1, self.samples)


def _scattered(values: Tensor, positions: Tensor) -> Tensor:
    """(B, L) with ``values`` at ``positions`` and 0 elsewhere."""
    out = torch.zeros(positions.shape, dtype=values.dtype, device=values.device)
    out[positions] = values
    return out
