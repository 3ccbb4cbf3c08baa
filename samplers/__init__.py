"""Running a sampling plan on a stock diffusers pipeline."""

from .attach import Attachment, PlanWarning, attach, denoisers
from .call import Call, CallHook, Step
from .errors import InputError
from .fingerprint import fingerprint
from .grid import ExplicitGrid, SpacingGrid
from .guidance import ConstantGuidance
from .guidance_schedule import GuidanceSchedule
from .network import Evaluation
from .part import Part, Run, Sampling
from .plan import Plan
from .process import Process
from .provenance import Evidence, TunedFor
from .solver import DiffusersSolver
from .stats import Stats, StepRecord

__all__ = [
    "Attachment",
    "Call",
    "CallHook",
    "ConstantGuidance",
    "DiffusersSolver",
    "Evaluation",
    "Evidence",
    "ExplicitGrid",
    "GuidanceSchedule",
    "InputError",
    "Part",
    "Plan",
    "PlanWarning",
    "Process",
    "Run",
    "Sampling",
    "SpacingGrid",
    "Stats",
    "Step",
    "StepRecord",
    "TunedFor",
    "attach",
    "denoisers",
    "fingerprint",
]
