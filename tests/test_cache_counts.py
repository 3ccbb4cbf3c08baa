"""What the stats say ran in each module is what hooks of torch count there."""

import warnings
from collections import Counter

import pytest
import torch
from cache_parts import makers_of
from support_matrix import columns
from torch.utils._pytree import tree_leaves
from zoo import ZOO

from fewstep.samplers import Gate, Plan, PlanWarning, attach

FAMILIES = ("ddim", "stable-diffusion", "dit", "pixart-sigma", "sd3", "sana", "flux", "wan", "cogview4")
STEPS = 4


class Profile:
    """Calls of modules and the rows they were given, counted by hooks of torch."""

    def __init__(self, modules):
        self.calls, self.rows = Counter(), Counter()
        self.hooks = [
            module.register_forward_hook(
                lambda _module, args, kwargs, _output, name=name: self.see(name, args, kwargs), with_kwargs=True
            )
            for name, module in modules.items()
        ]

    def see(self, name, args, kwargs):
        first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        self.calls[name] += 1
        self.rows[name] += len(first)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@pytest.fixture(scope="module")
def makers():
    found = {name: makers_of(ZOO[name]) for name in FAMILIES}
    found["dit"]["gate of some rows"] = lambda pipe, steps: Gate(threshold=0.9)
    return found


def test_every_cache_that_works_on_a_family_is_among_them(makers):
    assert {cache for found in makers.values() for cache in found} >= set(columns()) - {"host: TextKVCache"}


@pytest.mark.parametrize("name", FAMILIES)
def test_modules_ran_as_often_and_with_as_many_rows_as_hooks_see(name, makers):
    family = ZOO[name]
    pipe = family.build()
    for cache, make in makers[name].items():
        part = make(pipe, STEPS)
        modules = part.modules(pipe)
        with Profile(modules) as plain:
            family.call(pipe, steps=STEPS)
        with (
            warnings.catch_warnings(action="ignore", category=PlanWarning),
            Profile(modules) as seen,
            attach(pipe, Plan(caches=part)) as handle,
        ):
            family.call(pipe, steps=STEPS)
        counted = {key: (rows.calls, rows.run) for key, rows in handle.stats.modules.items() if rows.run}
        assert counted == {key: (seen.calls[key], seen.rows[key]) for key in seen.calls}, cache
        skipped = {key: rows.skipped for key, rows in handle.stats.modules.items() if rows.skipped}
        assert skipped, cache
        if cache == "host: FasterCache":  # leaves rows out of the whole network as well
            continue
        for key in modules:
            if not any(key.startswith(f"{other}.") for other in modules):
                assert seen.rows[key] + skipped.get(key, 0) == plain.rows[key], (cache, key)
