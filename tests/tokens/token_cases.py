"""One or more instances of every registered policy: what runs through the tests that hold for all of them.

A new policy adds a line. ``CASES[slot]`` maps a label, the registered name and perhaps more, to fields of a recipe.
"""

import tempfile

import torch

from fewstep.samplers.tokens import (
    Allowed,
    Ancestral,
    Ascending,
    AscendingBlocks,
    Ban,
    BlockPrefix,
    CallableCausal,
    Credit,
    Dfa,
    Dimple,
    DkvCache,
    DkvGreedy,
    DualCache,
    Edit,
    EndSuppression,
    Energy,
    EntropyBound,
    EntropyEnd,
    EosExit,
    EotExit,
    Factor,
    FirstHitting,
    Fixed,
    FreeCache,
    Guider,
    Json,
    Learned,
    LocalLeap,
    MaskGIT,
    Nested,
    Order,
    OutputCache,
    PositionWeighted,
    PrefixCache,
    PromptPrefill,
    Prophet,
    Quota,
    Recap,
    Recipe,
    Refresh,
    RefreshAll,
    ReMDM,
    SimilarityCache,
    Sliding,
    Speculative,
    StableConfident,
    SubBlockCache,
    Threshold,
    TokenFilter,
    TokenGuidance,
    Whole,
)

CASES = {
    "blocks": {
        "whole": Whole(),
        "fixed": Fixed(length=3),
        "fixed of 32": Fixed(),
        "ascending blocks": AscendingBlocks(block_num=2),
        "nested": Nested(length=5, inner=2),
        "sliding": Sliding(length=3),
        "entropy-end": EntropyEnd(bound=0.5, shortest=1, longest=3),
    },
    "unmask": {
        "quota": Quota(tokens=2),
        "quota by margin": Quota(steps_per_block=3, confidence="margin"),
        "quota by entropy": Quota(steps=4, confidence="entropy"),
        "quota at random": Quota(steps=8, confidence="random"),
        "threshold": Threshold(threshold=0.5),
        "factor": Factor(factor=1.5),
        "entropy-bound": EntropyBound(bound=2.0),
        "entropy-bound by margin": EntropyBound(bound=0.8, strict=True, error="margin"),
        "dimple": Dimple(threshold=0.5, steps=5),
        "local-leap": LocalLeap(threshold=0.5, relaxed=0.3, radius=2),
        "first-hitting": FirstHitting(),
        "ancestral": Ancestral(steps=6),
        "maskgit": MaskGIT(steps=4),
        "ass": Ascending(),
        "pc": PositionWeighted(tokens=2),
        "learned": Learned(length=16, threshold=0.5),
        "order": Order(tokens=3),
        "order from the left": Order(random=False),
    },
    "exit": {
        "none": {"type": "none"},
        "eos": EosExit(),
        "eos dropped": EosExit(drop=True),
        "eot": EotExit(threshold=0.2),
        "prophet": Prophet(thresholds=(1.0, 0.7, 0.5)),
        "prophet of a block": Prophet(thresholds=(1.0, 0.7, 0.5), scope="block"),
        "stable-confident": StableConfident(entropy=1.5),
    },
    "remask": {
        "none": {"type": "none"},
        "remdm cap": ReMDM(rule="cap", eta=0.1),
        "remdm rescale": ReMDM(rule="rescale", eta=0.3),
        "remdm conf": ReMDM(rule="conf"),
        "remdm loop": ReMDM(rule="loop", eta=0.2),
        "edit": Edit(threshold=0.3, post_steps=3),
    },
    "cache": {
        "none": {"type": "none"},
        "output": OutputCache(),
        "refresh-all": RefreshAll(),
        "block-prefix": BlockPrefix(),
        "prefix": PrefixCache(refresh=3),
        "dual": DualCache(),
        "sub-block": SubBlockCache(),
        "dkv": DkvCache(refresh=3),
        "dkv pd": DkvCache(keep_prompt=True),
        "dkv-greedy": DkvGreedy(),
        "free": FreeCache(length=2),
        "prompt-prefill": PromptPrefill(),
        "recap": Recap(plain_steps=1),
        "similarity": SimilarityCache(prompt_refresh=3, answer_refresh=2),
        "refresh": Refresh(),
        "refresh by drift": Refresh(prompt_refresh=None, drift_limit=0.1, probes=1),
    },
    "logits": {
        "cfg": TokenGuidance(scale=1.5),
        "ban": Ban(banned=(3, 4)),
        "eoser": EndSuppression(),
        "credit": Credit(),
    },
    "constraint": {
        "none": {"type": "none"},
        "allowed": Allowed(tokens=((), (1, 2, 3, 4, 9, 7, 5), ())),
        "dfa": Dfa(pattern=r"[^\n]*"),
        "json": Json(root="value"),
    },
    "scorer": {
        "none": {"type": "none"},
        "energy": Energy(start=1.0, end=0.0),
        "guider": Guider(top_k=8),
        "speculative": Speculative(),
    },
}


WITH = {
    "dkv-greedy": {"unmask": Order(tokens=2)},
    "guider": {"unmask": Order(tokens=3, random=False)},
    "speculative": {"unmask": Order(tokens=3, random=False)},
    "ascending blocks": {"unmask": Ascending()},
    **{f"remdm {rule}": {"unmask": Ancestral(steps=6)} for rule in ("cap", "rescale", "conf", "loop")},
}
"""What else a recipe needs for a case, by label."""


def resources(spec):
    """What the cases ask for by name: what tokens spell, and an autoregressive model that looks one token back."""
    table = torch.randn(spec.vocab_size, spec.vocab_size, generator=torch.Generator().manual_seed(2))
    spelt = ["", *'{}[]":,01e.-', "true", "fals", "e", "nu", "ll", *"abcdefghijklmnop"][: spec.vocab_size]
    return {"vocabulary": spelt, "ar": CallableCausal(lambda ids: table[ids], spec.vocab_size, bos_id=0)}


FOLDER = tempfile.TemporaryDirectory(prefix="fewstep-recipes-")
"""Of recipes that read files; it goes with the process."""


def beside_a_filter(recipe):
    """The recipe, loaded from a folder that has the file of `Learned`."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        TokenFilter(16).save(f"{FOLDER.name}/token-filter.safetensors")
    recipe.save(f"{FOLDER.name}/recipe.json")
    return Recipe.load(f"{FOLDER.name}/recipe.json")


def recipes():
    """A recipe for each case, by slot and label: the case in one that draws its tokens, two per step."""
    base = beside_a_filter(Recipe(unmask=Quota(tokens=2), propose={"temperature": 0.8}))
    return {
        f"{slot}: {label}": base.replace(**{slot: policy}, **WITH.get(label, {}))
        for slot, cases in CASES.items()
        for label, policy in cases.items()
    }
