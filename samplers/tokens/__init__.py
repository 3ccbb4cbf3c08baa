"""Discrete diffusion: one decode loop, with policies and caches that plug in."""

from .ban import Ban
from .blocks import Fixed, Whole
from .denoiser import CallableDenoiser, Denoiser, DenoiserSpec, Query
from .eos_exit import EosExit
from .guidance import TokenGuidance
from .loop import decode
from .output_cache import OutputCache
from .presets import RECIPES
from .proposal import Proposal
from .quota import Quota
from .recipe import Recipe
from .refresh_all import RefreshAll
from .result import Decoded
from .slots import (
    BLOCKS,
    CACHES,
    CONSTRAINTS,
    EXITS,
    LOGITS,
    REMASKS,
    SCORERS,
    UNMASKS,
    BlockSchedule,
    CachePlan,
    Choice,
    Constraint,
    Exit,
    LogitsProcessor,
    Policy,
    PolicyError,
    Remask,
    Scorer,
    TokenCache,
    Unmask,
)
from .state import DecodeState
from .threshold import Threshold
from .transformers_denoiser import TransformersDenoiser
from .uvit_denoiser import UViTDenoiser

__all__ = [
    "BLOCKS",
    "CACHES",
    "CONSTRAINTS",
    "EXITS",
    "LOGITS",
    "RECIPES",
    "REMASKS",
    "SCORERS",
    "UNMASKS",
    "Ban",
    "BlockSchedule",
    "CachePlan",
    "CallableDenoiser",
    "Choice",
    "Constraint",
    "DecodeState",
    "Decoded",
    "Denoiser",
    "DenoiserSpec",
    "EosExit",
    "Exit",
    "Fixed",
    "LogitsProcessor",
    "OutputCache",
    "Policy",
    "PolicyError",
    "Proposal",
    "Query",
    "Quota",
    "Recipe",
    "RefreshAll",
    "Remask",
    "Scorer",
    "Threshold",
    "TokenCache",
    "TokenGuidance",
    "TransformersDenoiser",
    "UViTDenoiser",
    "Unmask",
    "Whole",
    "decode",
]
