"""Training-free search of sampling plans."""

from . import axes  # noqa: F401  registers them
from .budget import Budget, Judges
from .cache import Calibration, search_cache
from .found import Candidate, Found, Scored
from .ladders import LADDERS
from .objective import COSTS, QUALITIES, Limit, Objective
from .optuna_samplers import OPTUNA_SAMPLERS
from .plan_search import SearchSetting, search
from .presets import PRESETS
from .report import write_search_report
from .space import AXES, Axis, Space

__all__ = [
    "AXES",
    "COSTS",
    "LADDERS",
    "OPTUNA_SAMPLERS",
    "PRESETS",
    "QUALITIES",
    "Axis",
    "Budget",
    "Calibration",
    "Candidate",
    "Found",
    "Judges",
    "Limit",
    "Objective",
    "Scored",
    "SearchSetting",
    "Space",
    "search",
    "search_cache",
    "write_search_report",
]
