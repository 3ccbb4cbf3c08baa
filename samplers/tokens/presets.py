"""Recipes of the literature, with the defaults of their papers."""

from __future__ import annotations

from .ancestral import Ancestral
from .ascending import Ascending, AscendingBlocks
from .block_prefix import BlockPrefix
from .blocks import Fixed, Whole
from .dimple import Dimple
from .dkv_cache import DkvCache
from .dual_cache import DualCache
from .edit import Edit
from .energy import Energy
from .entropy_bound import EntropyBound
from .eos_exit import EosExit
from .eoser import EndSuppression
from .first_hitting import FirstHitting
from .free_cache import FreeCache
from .guidance import TokenGuidance
from .guider import Guider
from .local_leap import LocalLeap
from .maskgit import MaskGIT
from .nested_blocks import Nested
from .order import Order
from .output_cache import OutputCache
from .prefix_cache import PrefixCache
from .prompt_prefill import PromptPrefill
from .prophet import Prophet
from .proposal import Proposal
from .quota import Quota
from .recap import Recap
from .recipe import RECIPES, Recipe
from .remdm import ReMDM
from .similarity import SimilarityCache
from .speculative import Speculative
from .sub_block import SubBlockCache
from .threshold import Threshold

RECIPES.register("llada")(Recipe(name="llada", blocks=Whole(), unmask=Quota(steps=128)))
RECIPES.register("fast-dllm")(Recipe(name="fast-dllm", blocks=Fixed(length=32), unmask=Threshold(threshold=0.9)))

_FAST = RECIPES["fast-dllm"]
RECIPES.register("fast-dllm-prefix")(_FAST.replace(name="fast-dllm-prefix", cache=PrefixCache()))
RECIPES.register("fast-dllm-dual")(_FAST.replace(name="fast-dllm-dual", cache=DualCache()))
_NESTED = _FAST.replace(blocks=Nested(length=None, inner=8))
RECIPES.register("fast-dllm-v2")(_NESTED.replace(name="fast-dllm-v2", cache=BlockPrefix()))
RECIPES.register("fast-dllm-v2-sub-block")(_NESTED.replace(name="fast-dllm-v2-sub-block", cache=SubBlockCache()))
RECIPES.register("dkv")(Recipe(name="dkv", blocks=Fixed(length=64), unmask=Quota(tokens=1), cache=DkvCache()))
RECIPES.register("dllm-cache")(Recipe(name="dllm-cache", unmask=Quota(tokens=1), cache=SimilarityCache()))

_DRAWN = Proposal(temperature=1.0)
_NUCLEUS = Proposal(temperature=1.0, top_p=0.9)
RECIPES.register("mdlm")(Recipe(name="mdlm", unmask=Ancestral(steps=128), propose=_DRAWN, cache=OutputCache()))
RECIPES.register("radd")(Recipe(name="radd", unmask=Ancestral(steps=1024), propose=_DRAWN, cache=OutputCache()))
RECIPES.register("first-hitting")(Recipe(name="first-hitting", unmask=FirstHitting(), propose=_DRAWN))
_REMDM = Recipe(unmask=Ancestral(steps=1024), propose=_NUCLEUS)
RECIPES.register("remdm-cap")(_REMDM.replace(name="remdm-cap", remask=ReMDM(rule="cap")))
RECIPES.register("remdm-rescale")(_REMDM.replace(name="remdm-rescale", remask=ReMDM(rule="rescale")))
RECIPES.register("remdm-conf")(_REMDM.replace(name="remdm-conf", remask=ReMDM(rule="conf")))
RECIPES.register("remdm-loop")(_REMDM.replace(name="remdm-loop", remask=ReMDM(rule="loop")))
RECIPES.register("dimple")(Recipe(name="dimple", unmask=Dimple(), propose=Proposal(temperature=0.2, top_p=0.95)))
RECIPES.register("dimple-prefill")(RECIPES["dimple"].replace(name="dimple-prefill", cache=PromptPrefill()))
RECIPES.register("local-leap")(_FAST.replace(name="local-leap", unmask=LocalLeap()))
RECIPES.register("entropy-bound")(_FAST.replace(name="entropy-bound", unmask=EntropyBound()))
RECIPES.register("prophet")(_FAST.replace(name="prophet", unmask=Quota(tokens=1), exit=Prophet()))
RECIPES.register("ass")(Recipe(name="ass", blocks=AscendingBlocks(), unmask=Ascending()))
RECIPES.register("eoser")(_FAST.replace(name="eoser", unmask=Quota(tokens=2), logits=EndSuppression()))
RECIPES.register("maskgit")(Recipe(name="maskgit", unmask=MaskGIT(temperature=(4.5, 0.0)), propose=_DRAWN))
# Without guidance, and without the sampling temperature that falls from 1 to 0.75 over the steps.
RECIPES.register("recap")(
    Recipe(
        name="recap",
        unmask=MaskGIT(steps=32, schedule="concave", temperature=(5.5, 0.0)),
        propose=_DRAWN,
        cache=Recap(plain_steps=12, local_steps=1),
    )
)
RECIPES.register("amused")(Recipe(name="amused", unmask=MaskGIT(), propose=_DRAWN, logits=TokenGuidance(scale=10.0)))
RECIPES.register("llada-2.1")(
    Recipe(
        name="llada-2.1",
        blocks=Fixed(length=None),
        unmask=Threshold(threshold=0.7),
        remask=Edit(),
        exit=EosExit(),
        cache=BlockPrefix(),
    )
)
RECIPES.register("edlm")(RECIPES["mdlm"].replace(name="edlm", scorer=Energy()))
_LEFT = Recipe(unmask=Order(tokens=32, random=False))
RECIPES.register("flashdlm")(_LEFT.replace(name="flashdlm", cache=FreeCache(), scorer=Guider(top_k=1)))
# The length of a draft is ours: what pays depends on how much faster the denoiser is than its target.
_DRAFT = Recipe(unmask=Order(tokens=16, random=False), propose=_DRAWN)
RECIPES.register("specdiff")(_DRAFT.replace(name="specdiff", scorer=Speculative()))

__all__ = ["RECIPES"]
