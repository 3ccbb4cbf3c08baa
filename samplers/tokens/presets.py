"""Recipes of the literature, with the defaults of their papers."""

from __future__ import annotations

from .block_prefix import BlockPrefix
from .blocks import Fixed, Whole
from .dkv_cache import DkvCache
from .dual_cache import DualCache
from .prefix_cache import PrefixCache
from .quota import Quota
from .recipe import RECIPES, Recipe
from .similarity import SimilarityCache
from .sub_block import SubBlockCache
from .threshold import Threshold

RECIPES.register("llada")(Recipe(name="llada", blocks=Whole(), unmask=Quota(steps=128)))
RECIPES.register("fast-dllm")(Recipe(name="fast-dllm", blocks=Fixed(length=32), unmask=Threshold(threshold=0.9)))

_FAST = RECIPES["fast-dllm"]
RECIPES.register("fast-dllm-prefix")(_FAST.replace(name="fast-dllm-prefix", cache=PrefixCache()))
RECIPES.register("fast-dllm-dual")(_FAST.replace(name="fast-dllm-dual", cache=DualCache()))
_SMALL = _FAST.replace(blocks=Fixed(length=8))
RECIPES.register("fast-dllm-v2")(_SMALL.replace(name="fast-dllm-v2", cache=BlockPrefix()))
RECIPES.register("fast-dllm-v2-sub-block")(_SMALL.replace(name="fast-dllm-v2-sub-block", cache=SubBlockCache()))
RECIPES.register("dkv")(Recipe(name="dkv", blocks=Fixed(length=64), unmask=Quota(tokens=1), cache=DkvCache()))
RECIPES.register("dllm-cache")(Recipe(name="dllm-cache", unmask=Quota(tokens=1), cache=SimilarityCache()))

__all__ = ["RECIPES"]
