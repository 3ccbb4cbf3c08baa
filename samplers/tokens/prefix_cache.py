"""What lies before the active block."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .interval_cache import IntervalCache
from .slots import CACHES
from .state import DecodeState


@CACHES.register("prefix")
class PrefixCache(IntervalCache):
    """Keys and values before the active block stay until the next one begins (Fast-dLLM, arXiv:2505.22618, 3.2).

    The block and everything after it is evaluated in each step. For prefixes that are exact see ``block-prefix``.
    """

    type: Literal["prefix"] = "prefix"

    def between(self, state: DecodeState) -> Tensor:
        """From the block on."""
        return state.columns >= state.block_start[:, None]
