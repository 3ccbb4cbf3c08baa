"""Running a sampling plan on a stock diffusers pipeline."""

from .attach import Attachment, PlanWarning, attach, denoisers
from .errors import InputError
from .fingerprint import fingerprint
from .grid import ExplicitGrid, SpacingGrid
from .guidance import ConstantGuidance
from .part import Part, Run
from .plan import Plan
from .process import Process
from .provenance import Evidence, TunedFor
from .solver import DiffusersSolver
from .stats import Stats, StepRecord

__all__ = [
    "Attachment",
    "ConstantGuidance",
    "DiffusersSolver",
    "Evidence",
    "ExplicitGrid",
    "InputError",
    "Part",
    "Plan",
    "PlanWarning",
    "Process",
    "Run",
    "SpacingGrid",
    "Stats",
    "StepRecord",
    "TunedFor",
    "attach",
    "denoisers",
    "fingerprint",
]
