"""One or more instances of every registered policy: what runs through the tests that hold for all of them.

A new policy adds a line. ``CASES[slot]`` maps a label, the registered name and perhaps more, to fields of a recipe.
"""

from fewstep.samplers.tokens import (
    Ban,
    EosExit,
    Fixed,
    OutputCache,
    Quota,
    Recipe,
    RefreshAll,
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
    },
    "exit": {"none": {"type": "none"}, "eos": EosExit(), "eos dropped": EosExit(drop=True)},
    "remask": {"none": {"type": "none"}},
    "cache": {"none": {"type": "none"}, "output": OutputCache(), "refresh-all": RefreshAll()},
    "logits": {"cfg": TokenGuidance(scale=1.5), "ban": Ban(banned=(3, 4))},
    "constraint": {"none": {"type": "none"}},
    "scorer": {"none": {"type": "none"}},
}


def recipes():
    """A recipe for each case, by slot and label: the case in one that draws its tokens, two per step."""
    base = Recipe(unmask=Quota(tokens=2), propose={"temperature": 0.8})
    return {
        f"{slot}: {label}": base.replace(**{slot: policy})
        for slot, cases in CASES.items()
        for label, policy in cases.items()
    }
