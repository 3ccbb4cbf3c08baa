"""What scorers that verify drafts from left to right have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .order import Order
from .recipe import Recipe
from .slots import Choice, Exit
from .state import DecodeState


def check_left_to_right(recipe: Recipe, scorer: str) -> None:
    """What a scorer that accepts a prefix needs of the rest of a recipe.

    Raises:
        InputError: when the drafts are not the next tokens as they were drawn.
    """
    if not isinstance(recipe.unmask, Order) or recipe.unmask.random:
        raise InputError(
            f"the {scorer} scorer accepts drafts from left to right, and unmask {recipe.unmask.type} chooses others; "
            "use order with random=False"
        )
    if recipe.remask.rewrites:
        raise InputError(
            f"the {scorer} scorer has accepted what is committed, and {recipe.remask.type} takes it back; use remask "
            "none"
        )
    if type(recipe.exit).all_in is not Exit.all_in:
        raise InputError(
            f"the {recipe.exit.type} exit commits drafts at once by how sure they are, which the {scorer} scorer is "
            "there to decide; use exit none or eos"
        )


def check_masks_last(state: DecodeState, scorer: str) -> None:
    """Refuses masks that are followed by tokens.

    Raises:
        InputError: when a row has some.
    """
    followed = (state.masked.long().cumsum(1) > 0) & ~state.masked & state.present
    if bool(followed.any()):
        row = int(followed.any(1).nonzero()[0])
        raise InputError(
            f"the {scorer} scorer reads from left to right, and row {row} has tokens after its masks; give prompts "
            "without masks, or use scorer none"
        )


def leading(state: DecodeState, choice: Choice) -> Tensor:
    """(B, L) bool, the chosen positions that no mask which is not chosen precedes."""
    select = choice.select & state.masked
    return select & ((state.masked & ~select).long().cumsum(1) == 0)


def places(state: DecodeState, positions: Tensor) -> Tensor:
    """(N,) for each of ``positions`` (B, L), row by row: which of the known positions it is; -1 for an unknown one."""
    number = torch.full_like(state.x, -1)
    number[state.at] = torch.arange(len(state.at[0]), device=state.x.device)
    return number[positions]
