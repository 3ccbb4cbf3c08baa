"""Everything but the active block."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .interval_cache import IntervalCache
from .slots import CACHES
from .state import DecodeState


@CACHES.register("dual")
class DualCache(IntervalCache):
    """Keys and values before and after the active block stay until the next begins (Fast-dLLM, arXiv:2505.22618, 3.2).

    Only the block is evaluated in each step.
    """

    type: Literal["dual"] = "dual"

    def between(self, state: DecodeState) -> Tensor:
        """The block."""
        return state.in_block
