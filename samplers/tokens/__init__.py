"""Discrete diffusion: one decode loop, with policies and caches that plug in."""

from .ban import Ban
from .block_prefix import BlockPrefix
from .blocks import Fixed, Whole
from .denoiser import CallableDenoiser, Denoiser, DenoiserSpec, Query
from .dkv_cache import DkvCache
from .dkv_greedy import DkvGreedy
from .dual_cache import DualCache
from .eos_exit import EosExit
from .free_cache import FreeCache
from .guidance import TokenGuidance
from .interval_cache import IntervalCache
from .loop import decode
from .order import Order
from .output_cache import OutputCache
from .prefix_cache import PrefixCache
from .presets import RECIPES
from .prompt_prefill import PromptPrefill
from .proposal import Proposal
from .quota import Quota
from .recap import Recap
from .recipe import Recipe
from .refresh import Refresh
from .refresh_all import RefreshAll
from .result import Decoded
from .similarity import SimilarityCache
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
from .sub_block import SubBlockCache
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
    "BlockPrefix",
    "BlockSchedule",
    "CachePlan",
    "CallableDenoiser",
    "Choice",
    "Constraint",
    "DecodeState",
    "Decoded",
    "Denoiser",
    "DenoiserSpec",
    "DkvCache",
    "DkvGreedy",
    "DualCache",
    "EosExit",
    "Exit",
    "Fixed",
    "FreeCache",
    "IntervalCache",
    "LogitsProcessor",
    "Order",
    "OutputCache",
    "Policy",
    "PolicyError",
    "PrefixCache",
    "PromptPrefill",
    "Proposal",
    "Query",
    "Quota",
    "Recap",
    "Recipe",
    "Refresh",
    "RefreshAll",
    "Remask",
    "Scorer",
    "SimilarityCache",
    "SubBlockCache",
    "Threshold",
    "TokenCache",
    "TokenGuidance",
    "TransformersDenoiser",
    "UViTDenoiser",
    "Unmask",
    "Whole",
    "decode",
]
