"""One or more instances of every registered policy: what runs through the tests that hold for all of them.

A new policy adds a line. ``CASES[slot]`` maps a label, the registered name and perhaps more, to fields of a recipe.
"""

from fewstep.samplers.tokens import (
    Ban,
    BlockPrefix,
    DkvCache,
    DkvGreedy,
    DualCache,
    EosExit,
    Fixed,
    FreeCache,
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
    TokenGuidance,
    Whole,
)

CASES = {
    "blocks": {"whole": Whole(), "fixed": Fixed(length=3), "fixed of 32": Fixed()},
    "unmask": {
        "quota": Quota(tokens=2),
        "quota by margin": Quota(steps_per_block=3, confidence="margin"),
        "quota by entropy": Quota(steps=4, confidence="entropy"),
        "quota at random": Quota(steps=8, confidence="random"),
        "threshold": Threshold(threshold=0.5),
        "order": Order(tokens=3),
        "order from the left": Order(random=False),
    },
    "exit": {"none": {"type": "none"}, "eos": EosExit(), "eos dropped": EosExit(drop=True)},
    "remask": {"none": {"type": "none"}},
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
    "logits": {"cfg": TokenGuidance(scale=1.5), "ban": Ban(banned=(3, 4))},
    "constraint": {"none": {"type": "none"}},
    "scorer": {"none": {"type": "none"}},
}


WITH = {"dkv-greedy": {"unmask": Order(tokens=2)}}
"""What else a recipe needs for a case, by label."""


def recipes():
    """A recipe for each case, by slot and label: the case in one that draws its tokens, two per step."""
    base = Recipe(unmask=Quota(tokens=2), propose={"temperature": 0.8})
    return {
        f"{slot}: {label}": base.replace(**{slot: policy}, **WITH.get(label, {}))
        for slot, cases in CASES.items()
        for label, policy in cases.items()
    }
