"""A small network that has learned which tokens stay."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from ..errors import InputError
from ..files import file_beside
from .learned_filter import TokenFilter, block_features
from .recipe import Recipe
from .slots import UNMASKS, Unmask
from .state import DecodeState, top

RESOURCE = "token-filter"


@UNMASKS.register("learned")
class Learned(Unmask):
    """Open positions that a filter takes for final, and the surest one (Learn2PD, arXiv:2509.25188).

    The filter is a file beside the recipe, or a `TokenFilter` that ``decode`` gets as resource "token-filter". It is
    made for blocks of one length.
    """

    type: Literal["learned"] = "learned"
    file: str = Field(default="token-filter.safetensors", min_length=1, description="Of the filter's weights.")
    length: int = Field(default=32, ge=1, description="Positions of the blocks that the filter is made for.")
    threshold: float = Field(default=0.9, ge=0, le=1, description="Probability of being final.")

    @property
    def files(self) -> tuple[str, ...]:
        """The filter's weights."""
        return (self.file,)

    def check(self, recipe: Recipe) -> None:
        """Blocks have to be those of the filter."""
        length = getattr(recipe.blocks, "inner", getattr(recipe.blocks, "length", None))
        if length is not None and length != self.length:
            raise InputError(
                f"the learned policy has a filter for blocks of {self.length}, and the recipe has blocks of {length}; "
                "use the block length that the filter was trained with"
            )

    def begin(self, state: DecodeState) -> None:
        """Reads the filter."""
        network = state.resources.get(RESOURCE)
        if network is None:
            network = TokenFilter.load(file_beside(state.recipe.folder, f"{self.type} policy", self.file, "recipe"))
        if network.length != self.length:
            raise InputError(
                f"the token filter is made for blocks of {network.length}, and the learned policy says {self.length}; "
                "use blocks and a policy of the filter's length"
            )
        state.memory[self] = network.to(state.x.device)

    def select(self, state: DecodeState) -> Tensor:
        """What the filter takes for final."""
        network: TokenFilter = state.memory[self]
        features, index = block_features(state, self.length)
        final = network(features).sigmoid() >= self.threshold
        chosen = state.known.new_zeros((state.known.shape[0], state.known.shape[1] + 1)).scatter(1, index, final)
        best = top(state.confidence("prob"), state.candidates, state.alive.long())
        return best | (chosen[:, :-1] & state.candidates)
