"""Only what is decoded now, what was decoded last, and what is around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import max_pool1d

from ..errors import InputError
from .interval_cache import IntervalCache
from .slots import CACHES, Unmask
from .state import DecodeState

if TYPE_CHECKING:
    from .recipe import Recipe


@CACHES.register("dkv-greedy")
class DkvGreedy(IntervalCache):
    """dKV-Cache-Greedy (arXiv:2505.15781): masks keep their keys and values too.

    A step evaluates the positions that it will commit, those of the step before, and a window around them. So the
    order has to be known before anything is evaluated.
    """

    type: Literal["dkv-greedy"] = "dkv-greedy"
    refresh: int | None = Field(
        default=2,
        ge=1,
        description="Steps of a block from one evaluation of everything to the next; none: only where a block begins.",
    )
    window: int = Field(default=2, ge=0, description="Positions on either side that are evaluated with a token.")

    def check(self, recipe: Recipe) -> None:
        """The order must not depend on logits."""
        if type(recipe.unmask).ahead is Unmask.ahead:
            raise InputError(
                f"the dkv-greedy cache evaluates what is about to be committed, and the {recipe.unmask.type} policy "
                "does not say that in advance; use the order policy, or the dkv cache"
            )

    def between(self, state: DecodeState) -> Tensor:
        """What comes, what came, and what is near."""
        ahead = state.recipe.unmask.ahead(state)
        centre = state.stale if ahead is None else ahead | state.stale
        width = 2 * self.window + 1
        return max_pool1d(centre[:, None].float(), width, stride=1, padding=self.window)[:, 0] > 0
