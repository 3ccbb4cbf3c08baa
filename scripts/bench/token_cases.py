"""The caches that token_caches.py measures, and the recipes that they are measured in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fewstep.samplers.tokens import (
    BlockPrefix,
    BlockSchedule,
    DenoiserSpec,
    DkvCache,
    DkvGreedy,
    DualCache,
    Fixed,
    FreeCache,
    Nested,
    Order,
    OutputCache,
    PrefixCache,
    PromptPrefill,
    Quota,
    Recap,
    Recipe,
    Refresh,
    RefreshAll,
    SimilarityCache,
    SubBlockCache,
    Threshold,
    TokenCache,
    Unmask,
)
from fewstep.samplers.tokens.none import NoCache

Policy = Literal["one", "threshold", "random"]

POLICIES: dict[Policy, Unmask] = {"one": Quota(tokens=1), "threshold": Threshold(threshold=0.9), "random": Order()}
"""One token a step, the surest; everything that is sure enough; one token a step, in an order drawn beforehand."""
BLOCK = 32
"Masks of a block, so that an interval of as many steps is once a block."
PLAIN_BLOCKS = Fixed(length=BLOCK)
SUB_BLOCKS = Nested(length=BLOCK, inner=8)
BOTH: tuple[Policy, ...] = ("one", "threshold")
INTERVALS = (1, 2, 4, 8, 16, BLOCK)
DRIFTS = (0.02, 0.05, 0.1, 0.2)
"Limits of the drift probe."

NO_CACHE = NoCache()


@dataclass(frozen=True)
class Case:
    """A cache in a recipe.

    Attributes:
        family: what a curve is called.
        setting: the rest of its name.
        cache: with its settings.
        policies: that it is measured with.
        interval: steps from one evaluation of what it keeps to the next; None where there is no such number.
        frozen: whether the prompt keeps the keys and values of the block's first steps.
        blocks: the block schedule.
    """

    family: str
    setting: str
    cache: TokenCache
    policies: tuple[Policy, ...] = BOTH
    interval: int | None = None
    frozen: bool = False
    blocks: BlockSchedule = PLAIN_BLOCKS

    @property
    def name(self) -> str:
        """Family and setting."""
        return f"{self.family} {self.setting}".strip()

    def recipe(self, policy: Policy, cache: TokenCache | None = None) -> Recipe:
        """The recipe, or that of ``cache`` in its place."""
        return Recipe(blocks=self.blocks, unmask=POLICIES[policy], cache=self.cache if cache is None else cache)


FAMILIES: dict[str, Callable[[int], TokenCache]] = {
    "prefix": lambda every: PrefixCache(refresh=every),
    "dual": lambda every: DualCache(refresh=every),
    "dkv": lambda every: DkvCache(refresh=every),
    "dkv PD": lambda every: DkvCache(refresh=every, keep_prompt=True),
    "free": lambda every: FreeCache(refresh=every, length=8),
    "similarity": lambda every: SimilarityCache(prompt_refresh=every, answer_refresh=every),
    "refresh prompt": lambda every: Refresh(prompt_refresh=every),
    "refresh answer": lambda every: Refresh(answer_refresh=every, answer_at_block=False),
    "refresh prompt, answer fresh": lambda every: Refresh(prompt_refresh=every, answer_refresh=1),
}
"""Caches of a denoiser with full attention, by their interval.

The last three have two parts, each with an interval of its own: the other one is evaluated where a block begins, or in
every step. With equal intervals they are all but `dual`."""


def _sweep(
    family: str,
    make: Callable[[int], TokenCache],
    blocks: BlockSchedule = PLAIN_BLOCKS,
    longest: int = BLOCK,
    policies: tuple[Policy, ...] = BOTH,
) -> list[Case]:
    def frozen(every: int) -> bool:
        return family == "dkv PD" or (every == longest and family != "refresh answer")

    return [
        Case(family, str(every), make(every), policies, every, frozen(every), blocks)
        for every in INTERVALS
        if every <= longest
    ]


def _drift(limit: float) -> Case:
    return Case("refresh by drift", f"{limit:g}", Refresh(prompt_refresh=None, drift_limit=limit))


def agreement_cases(spec: DenoiserSpec) -> list[Case]:
    """What is followed along uncached trajectories.

    Recap is not among them: it computes the positions that it chose itself, which a trajectory need not commit.
    """
    if spec.attention == "block-causal":
        length = spec.block_length or 1
        inner = max(length // 2, 1)
        blocks = Nested(length=None, inner=inner)
        found = [Case("block-prefix", "", BlockPrefix(), blocks=blocks)]
        found += _sweep("sub-block", lambda every: SubBlockCache(refresh=every), blocks, inner)
        return found + _sweep("dual", lambda every: DualCache(refresh=every), blocks, inner)
    found = [case for family, make in FAMILIES.items() for case in _sweep(family, make)]
    found += _sweep("sub-block", lambda every: SubBlockCache(refresh=every), SUB_BLOCKS, SUB_BLOCKS.inner)
    found += _sweep("dkv-greedy", lambda every: DkvGreedy(refresh=every), policies=("random",))
    found += [_drift(limit) for limit in DRIFTS]
    exact = [Case(cache.type, "", cache) for cache in (RefreshAll(), BlockPrefix(), OutputCache())]
    return [*found, Case("prompt-prefill", "", PromptPrefill(), frozen=True), *exact]


def accuracy_cases(spec: DenoiserSpec) -> list[Case]:
    """What answers by itself: published caches at their defaults, and ours; no cache first."""
    followed = agreement_cases(spec)
    none = [Case("none", "", NO_CACHE, blocks=blocks) for blocks in dict.fromkeys(case.blocks for case in followed)]
    if spec.attention == "block-causal":
        return [*none, *(case for case in followed if case.interval in (None, max(_intervals(followed))))]
    chosen = {
        *(f"{family} {BLOCK}" for family in ("prefix", "dual", "free")),
        *("dual 2", "dual 4", "dual 8", "dkv 8", "dkv PD 8", "sub-block 8", "prompt-prefill", "dkv-greedy 2"),
        *("refresh prompt 1", "refresh prompt 4", "refresh answer 4", f"refresh prompt, answer fresh {BLOCK}"),
        *(f"refresh by drift {limit:g}" for limit in DRIFTS[1:3]),
    }
    rest = [Case("similarity", "of the paper", SimilarityCache(), frozen=True), Case("recap", "", Recap(), ("one",))]
    drawn = Case("none", "", NO_CACHE, ("random",))
    return [*none, drawn, *(case for case in followed if case.name in chosen), *rest]


def _intervals(cases: list[Case]) -> list[int]:
    return [case.interval for case in cases if case.interval is not None]
