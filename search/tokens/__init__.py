"""Searches for recipes: of least cost within limits of accuracy, chosen on some questions and reported on others."""

from .candidates import Candidates, RecipeCandidate, Refused, Variation, vary
from .journal import Answering, Journal
from .objective import TokenLimit, TokenObjective
from .recipe_search import REFERENCE, FoundRecipe, Trial, search_recipe
from .tally import ACCURACIES, COSTS, Tally
from .token_filter import FilterTraining, filter_base, filter_candidates, filter_data, fitted_filter

__all__ = [
    "ACCURACIES",
    "COSTS",
    "REFERENCE",
    "Answering",
    "Candidates",
    "FilterTraining",
    "FoundRecipe",
    "Journal",
    "RecipeCandidate",
    "Refused",
    "Tally",
    "TokenLimit",
    "TokenObjective",
    "Trial",
    "Variation",
    "filter_base",
    "filter_candidates",
    "filter_data",
    "fitted_filter",
    "search_recipe",
    "vary",
]
