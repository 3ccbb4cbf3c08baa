"""Training-free search of sampling plans."""

from .budget import Budget, Judges
from .cache import Calibration, search_cache
from .ladders import LADDERS

__all__ = ["LADDERS", "Budget", "Calibration", "Judges", "search_cache"]
