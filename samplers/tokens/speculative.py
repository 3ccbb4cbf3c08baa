"""The denoiser drafts, an autoregressive model verifies, and the law is the latter's."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, WithJsonSchema
from torch import Tensor

from ..errors import InputError
from .causal import reader_of
from .left_to_right import check_left_to_right, check_masks_last, leading, places
from .proposal import Proposal, draw
from .recipe import Recipe
from .slots import SCORERS, Choice, Scorer
from .state import DecodeState


@SCORERS.register("speculative")
class Speculative(Scorer):
    """Speculative diffusion decoding (SpecDiff, arXiv:2408.05636) by the rejection rule of arXiv:2211.17192.

    The denoiser drafts as many tokens as the unmask policy takes from the left, all in one step, each from its marginal
    q_i: the tempered and filtered law that it was drawn from. The autoregressive model reads them in one pass and
    expects p_i. From left to right a draft is accepted with probability min(1, p_i / q_i); the first rejected one gives
    way to a token drawn from (p_i - q_i)+, and the rest is dropped. If all are accepted, one more token is drawn from
    the model where the denoiser has evaluated that position. What comes out has the law of the autoregressive model
    under ``target``, whatever the denoiser, its recipe and its cache: they decide how many drafts are accepted.
    """

    type: Literal["speculative"] = "speculative"
    target: Annotated[Proposal, WithJsonSchema(Proposal.model_json_schema())] = Field(
        default=Proposal(temperature=1.0), description="How tokens are drawn from the autoregressive model."
    )

    def check(self, recipe: Recipe) -> None:
        """Drafts are verified as they were drawn."""
        check_left_to_right(recipe, self.type)
        if recipe.constraint.type != "none":
            raise InputError(
                f"the speculative scorer draws tokens that the {recipe.constraint.type} constraint does not know of; "
                "use one of the two"
            )

    def begin(self, state: DecodeState) -> None:
        """Opens the model."""
        check_masks_last(state, self.type)
        state.memory[self] = reader_of(state, self.type)

    def accept(self, state: DecodeState, choice: Choice) -> Choice:
        """The accepted drafts, and one token of the model."""
        accepting, drawing = state.uniform("selection"), state.uniform("selection")
        drafted = leading(state, choice)
        later = state.masked & ~drafted
        bonus = later & (later.long().cumsum(1) == 1) & state.known & drafted.any(1, keepdim=True)
        wanted = drafted | bonus
        tokens = torch.where(drafted, choice.tokens, state.x)
        p = self.target.probs(state.memory[self].read(state, tokens, wanted))
        q = state.recipe.propose.probs(state.logits)[places(state, wanted)] * drafted[wanted][:, None]
        token = tokens[wanted].clamp(max=p.shape[1] - 1)[:, None]
        taken = accepting[wanted] * q.gather(1, token)[:, 0] < p.gather(1, token)[:, 0]
        stop = torch.zeros_like(wanted)
        stop[wanted] = ~(taken & drafted[wanted])
        written = tokens.clone()
        written[wanted] = torch.where(stop[wanted], draw(_residual(p, q), 1 - drawing[wanted]), tokens[wanted])
        kept = wanted & (stop.long().cumsum(1) - stop.long() == 0)
        return Choice(kept, written, choice.failed)


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """(p - q)+; p where rounding leaves nothing, which happens where a rejection is impossible."""
    left = (p - q).clamp(min=0)
    return torch.where(left.sum(-1, keepdim=True) > 0, left, p)
