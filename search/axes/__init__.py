"""The axes of the space of a search, one part of a plan in each file; importing this registers them."""

from .correction import CorrectionAxis
from .grid import GridAxis
from .grid_index import GridIndexAxis
from .guidance import GuidanceAxis
from .solver import SolverAxis

__all__ = ["CorrectionAxis", "GridAxis", "GridIndexAxis", "GuidanceAxis", "SolverAxis"]
