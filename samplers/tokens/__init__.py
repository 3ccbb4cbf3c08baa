"""Discrete diffusion: one decode loop, with policies and caches that plug in."""

from .allowed import Allowed
from .ancestral import Ancestral
from .ascending import Ascending, AscendingBlocks
from .ban import Ban
from .block_prefix import BlockPrefix
from .blocks import Fixed, Whole
from .causal import CallableCausal, CausalModel, TransformersCausal
from .credit import Credit
from .denoiser import CallableDenoiser, Denoiser, DenoiserSpec, Query
from .dfa import Dfa
from .dimple import Dimple
from .dkv_cache import DkvCache
from .dkv_greedy import DkvGreedy
from .dual_cache import DualCache
from .edit import Edit
from .energy import Energy
from .entropy_blocks import EntropyEnd
from .entropy_bound import EntropyBound
from .eos_exit import EosExit
from .eoser import EndSuppression
from .eot_exit import EotExit
from .facade import TokenScheduler
from .factor import Factor
from .first_hitting import FirstHitting
from .folder import load_causal, load_denoiser, save_causal, save_denoiser
from .free_cache import FreeCache
from .guidance import TokenGuidance
from .guider import Guider
from .interval_cache import IntervalCache
from .json_text import Json
from .language import vocabulary_of
from .learned import Learned
from .learned_filter import FilterData, TokenFilter, replay, train_filter
from .local_leap import LocalLeap
from .loop import decode
from .maskgit import MaskGIT
from .nested_blocks import Nested
from .order import Order
from .output_cache import OutputCache
from .position_weight import PositionWeighted
from .prefix_cache import PrefixCache
from .presets import RECIPES
from .prompt_prefill import PromptPrefill
from .prophet import Prophet
from .proposal import Proposal
from .quota import Quota
from .recap import Recap
from .recipe import Recipe
from .refresh import Refresh
from .refresh_all import RefreshAll
from .remdm import ReMDM
from .result import Decoded
from .similarity import SimilarityCache
from .sliding_blocks import Sliding
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
from .speculative import Speculative
from .stable_confident import StableConfident
from .state import DecodeState
from .sub_block import SubBlockCache
from .threshold import Threshold
from .transformers_denoiser import TransformersDenoiser
from .uvit_denoiser import UViTDenoiser
from .vote import Voted, vote

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
    "Allowed",
    "Ancestral",
    "Ascending",
    "AscendingBlocks",
    "Ban",
    "BlockPrefix",
    "BlockSchedule",
    "CachePlan",
    "CallableCausal",
    "CallableDenoiser",
    "CausalModel",
    "Choice",
    "Constraint",
    "Credit",
    "DecodeState",
    "Decoded",
    "Denoiser",
    "DenoiserSpec",
    "Dfa",
    "Dimple",
    "DkvCache",
    "DkvGreedy",
    "DualCache",
    "Edit",
    "EndSuppression",
    "Energy",
    "EntropyBound",
    "EntropyEnd",
    "EosExit",
    "EotExit",
    "Exit",
    "Factor",
    "FilterData",
    "FirstHitting",
    "Fixed",
    "FreeCache",
    "Guider",
    "IntervalCache",
    "Json",
    "Learned",
    "LocalLeap",
    "LogitsProcessor",
    "MaskGIT",
    "Nested",
    "Order",
    "OutputCache",
    "Policy",
    "PolicyError",
    "PositionWeighted",
    "PrefixCache",
    "PromptPrefill",
    "Prophet",
    "Proposal",
    "Query",
    "Quota",
    "ReMDM",
    "Recap",
    "Recipe",
    "Refresh",
    "RefreshAll",
    "Remask",
    "Scorer",
    "SimilarityCache",
    "Sliding",
    "Speculative",
    "StableConfident",
    "SubBlockCache",
    "Threshold",
    "TokenCache",
    "TokenFilter",
    "TokenGuidance",
    "TokenScheduler",
    "TransformersCausal",
    "TransformersDenoiser",
    "UViTDenoiser",
    "Unmask",
    "Voted",
    "Whole",
    "decode",
    "load_causal",
    "load_denoiser",
    "replay",
    "save_causal",
    "save_denoiser",
    "train_filter",
    "vocabulary_of",
    "vote",
]
