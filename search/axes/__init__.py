"""The axes of the space of a search, one part of a plan in each file; importing this registers them."""

from .cache import DeepAxis, MaskAxis
from .conditioning import ConditioningAxis
from .correction import CorrectionAxis
from .grid import GridAxis
from .grid_index import GridIndexAxis
from .guidance import GuidanceAxis
from .layers import LayerListAxis, LayersAxis
from .models import ModelsAxis
from .solver import SolverAxis
from .start import StartAxis

__all__ = [
    "ConditioningAxis",
    "CorrectionAxis",
    "DeepAxis",
    "GridAxis",
    "GridIndexAxis",
    "GuidanceAxis",
    "LayerListAxis",
    "LayersAxis",
    "MaskAxis",
    "ModelsAxis",
    "SolverAxis",
    "StartAxis",
]
