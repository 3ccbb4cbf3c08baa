"""Running a sampling plan on a stock diffusers pipeline."""

from .adaptive_steps import AdaptiveSteps
from .aligner import Aligner
from .analytic_init import AnalyticInit, StartStatistics, estimate_start_statistics
from .attach import Attachment, PlanWarning, attach
from .block_mask import BlockMask, uniform_mask
from .build_knowledge import build_knowledge_base
from .cache import CACHES, CachePart
from .cache_call import CacheHook, Memory, Passing
from .call import Call, CallHook, Step
from .cross_attention_freeze import CrossAttentionFreeze
from .diagnosis import Diagnosis, Finding
from .doctor import doctor
from .epsilon_scaling import EpsilonScaling
from .errors import InputError
from .escalate import Escalate, calibrate_escalation
from .explicit import ExplicitSupport, explicit_support
from .feature_changes import measure_changes
from .fingerprint import fingerprint
from .gate import Gate
from .grid import ExplicitGrid, SpacingGrid
from .guidance import ConstantGuidance
from .guidance_schedule import GuidanceSchedule
from .host_cache import HostCache
from .knowledge import KnowledgeBase
from .layer_skip import LayerSkip
from .lora_weights import LoraWeights
from .model_switch import ModelSwitch
from .network import Evaluation, denoisers
from .part import Part, Run, Sampling
from .plan import Plan
from .process import Process
from .provenance import Evidence, TunedFor
from .redi import ReDi
from .router import Router, write_router
from .rule_grid import RuleGrid
from .scoring import Scorer
from .solver import DiffusersSolver
from .stats import ModuleRows, Stats, StepRecord, Work
from .step_rehash import StepRehash
from .student_weights import StudentWeights
from .time_shift import TimeShift
from .unet_deep import UNetDeep

__all__ = [
    "CACHES",
    "AdaptiveSteps",
    "Aligner",
    "AnalyticInit",
    "Attachment",
    "BlockMask",
    "CacheHook",
    "CachePart",
    "Call",
    "CallHook",
    "ConstantGuidance",
    "CrossAttentionFreeze",
    "Diagnosis",
    "DiffusersSolver",
    "EpsilonScaling",
    "Escalate",
    "Evaluation",
    "Evidence",
    "ExplicitGrid",
    "ExplicitSupport",
    "Finding",
    "Gate",
    "GuidanceSchedule",
    "HostCache",
    "InputError",
    "KnowledgeBase",
    "LayerSkip",
    "LoraWeights",
    "Memory",
    "ModelSwitch",
    "ModuleRows",
    "Part",
    "Passing",
    "Plan",
    "PlanWarning",
    "Process",
    "ReDi",
    "Router",
    "RuleGrid",
    "Run",
    "Sampling",
    "Scorer",
    "SpacingGrid",
    "StartStatistics",
    "Stats",
    "Step",
    "StepRecord",
    "StepRehash",
    "StudentWeights",
    "TimeShift",
    "TunedFor",
    "UNetDeep",
    "Work",
    "attach",
    "build_knowledge_base",
    "calibrate_escalation",
    "denoisers",
    "doctor",
    "estimate_start_statistics",
    "explicit_support",
    "fingerprint",
    "measure_changes",
    "uniform_mask",
    "write_router",
]
