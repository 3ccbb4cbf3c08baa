"""Recipes of the literature, with the defaults of their papers."""

from __future__ import annotations

from .blocks import Fixed, Whole
from .quota import Quota
from .recipe import RECIPES, Recipe
from .threshold import Threshold

RECIPES.register("llada")(Recipe(name="llada", blocks=Whole(), unmask=Quota(steps=128)))
RECIPES.register("fast-dllm")(Recipe(name="fast-dllm", blocks=Fixed(length=32), unmask=Threshold(threshold=0.9)))

__all__ = ["RECIPES"]
