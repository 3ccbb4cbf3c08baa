"""What each cache evaluates, counted by hand, and what it gives where it can be compared with no cache."""

import pytest
import torch
from test_token_store import RECIPE, TakeBack, assert_same_logits
from token_cases import CASES
from token_models import BLOCK_CAUSAL, PROMPTS, llama_denoiser, recorded
from transformers import DynamicCache

from fewstep.samplers import InputError
from fewstep.samplers.tokens import (
    RECIPES,
    BlockPrefix,
    DenoiserSpec,
    DkvCache,
    DkvGreedy,
    DualCache,
    Fixed,
    FreeCache,
    MaskGIT,
    Nested,
    Order,
    PrefixCache,
    PromptPrefill,
    Quota,
    Recap,
    Recipe,
    Refresh,
    SimilarityCache,
    SubBlockCache,
    Threshold,
    Whole,
    decode,
)

LEFT = Order(random=False)
"""One token per step, from left to right: what is evaluated can be said in advance."""
FULL = DenoiserSpec(mask_id=23, vocab_size=24)
OWN = RECIPE.replace(unmask=Order(tokens=2))
ALWAYS = {
    "block-prefix": BlockPrefix(),
    "prefix": PrefixCache(refresh=1),
    "dual": DualCache(refresh=1),
    "sub-block": SubBlockCache(refresh=1),
    "dkv": DkvCache(refresh=1),
    "dkv-greedy": DkvGreedy(refresh=1),
    "free": FreeCache(refresh=1, length=2),
    "recap": Recap(local_steps=0),
    "similarity": SimilarityCache(prompt_refresh=1, answer_refresh=1),
    "refresh": Refresh(prompt_refresh=1, answer_refresh=1, drift_limit=0.0),
}
"""Every cache, set to evaluate everything in every step."""


@pytest.fixture(scope="module")
def denoiser():
    return llama_denoiser()


@pytest.fixture(scope="module")
def blocked():
    return llama_denoiser(**BLOCK_CAUSAL)


def sizes(denoiser, prompts, length, recipe, **options):
    """(steps, B), how many positions each step evaluates, and what was decoded."""
    seen = []

    def watch(state):
        seen.append(((state.age == 0) & state.stored & state.alive[:, None]).sum(1))

    decoded = decode(denoiser, prompts, length, recipe, watch=watch, **options)
    assert torch.equal(torch.stack(seen).sum(0), decoded.token_forwards)
    return torch.stack(seen), decoded


def recipe_of(cache, **fields):
    """Two blocks of four."""
    return Recipe(**({"blocks": Fixed(length=4), "unmask": LEFT, "cache": cache} | fields))


@pytest.mark.parametrize("attention", ["full", "block-causal"])
@pytest.mark.parametrize("cache", ALWAYS.values(), ids=list(ALWAYS))
def test_a_cache_that_refreshes_in_every_step_is_no_cache(denoiser, blocked, cache, attention):
    model = denoiser if attention == "full" else blocked
    assert cache.exactness(model.spec)
    for prompts in (PROMPTS[:1], PROMPTS):
        plain, steps = recorded(decode, model, prompts, 8, OWN)
        cached, cached_steps = recorded(decode, model, prompts, 8, OWN.replace(cache=cache))
        assert torch.equal(plain.tokens, cached.tokens)
        assert torch.equal(plain.reveal_step, cached.reveal_step)
        assert_same_logits(steps, cached_steps, 3e-5)
        assert cached.exact


def test_only_caches_that_are_exact_say_so():
    for label, cache in CASES["cache"].items():
        if label not in ("none", "output", "refresh-all", "block-prefix"):
            assert not cache.exactness(FULL), label
    assert not DkvCache(refresh=1, keep_prompt=True).exactness(FULL)
    assert not Refresh(answer_refresh=2).exactness(FULL)
    assert not Recap().exactness(FULL)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("remask", [{"type": "none"}, TakeBack()], ids=["keep", "remask"])
def test_finished_blocks_of_a_block_causal_denoiser_are_exact(shift, remask):
    model = llama_denoiser(logit_shift=shift, **BLOCK_CAUSAL)
    recipe = RECIPE.replace(blocks=Fixed(length=None), remask=remask)
    for prompts in (PROMPTS[:1], PROMPTS):
        plain, steps = recorded(decode, model, prompts, 12, recipe)
        cached, cached_steps = recorded(decode, model, prompts, 12, recipe.replace(cache=BlockPrefix()))
        assert torch.equal(plain.tokens, cached.tokens)
        assert_same_logits(steps, cached_steps, 3e-5)
        assert cached.exact
        assert (cached.token_forwards < plain.token_forwards).all()


ANSWER = {"attention": "block-causal", "block_length": 4, "block_anchor": "answer"}
COSTS = [
    (BlockPrefix(), {}, {}, [11] * 8),
    (BlockPrefix(), {}, ANSWER, [7, 4, 4, 4, 8, 4, 4, 4]),
    (PrefixCache(), {}, {}, [11, 8, 8, 8, 11, 4, 4, 4]),
    (PrefixCache(refresh=3), {}, {}, [11, 8, 8, 11, 11, 4, 4, 11]),
    (PrefixCache(), {}, ANSWER, [7, 4, 4, 4, 11, 4, 4, 4]),
    (DualCache(), {}, {}, [11, 4, 4, 4, 11, 4, 4, 4]),
    (DualCache(refresh=2), {}, {}, [11, 4, 11, 4, 11, 4, 11, 4]),
    (DualCache(), {}, {"logit_shift": 1}, [11, 4, 4, 4, 11, 4, 4, 4]),
    (DualCache(), {"unmask": Threshold(threshold=0)}, {}, [11, 11]),
    (SubBlockCache(), {"blocks": Fixed(length=2)}, ANSWER, [7, 2, 4, 2, 8, 2, 4, 2]),
    (SubBlockCache(), {"blocks": Fixed(length=2)}, {}, [11, 2] * 4),
    (SubBlockCache(), {"blocks": Nested(length=None, inner=3)}, ANSWER, [7, 3, 3, 4, 8, 3, 3, 4]),
    (DkvCache(refresh=3), {}, {}, [11, 11, 7, 11, 11, 11, 3, 11]),
    (DkvCache(refresh=None), {}, {}, [11, 11, 7, 6, 11, 11, 3, 2]),
    (DkvCache(refresh=3, keep_prompt=True), {}, {}, [11, 8, 7, 8, 8, 8, 3, 8]),
    (DkvGreedy(refresh=None, window=1), {}, {}, [11, 4, 4, 4, 11, 4, 4, 3]),
    (DkvGreedy(window=0), {}, {}, [11, 2] * 4),
    (FreeCache(length=4), {}, {}, [11, 8, 8, 8, 5, 4, 4, 4]),
    (FreeCache(length=1), {}, {}, [11, 8, 7, 6, 5, 4, 3, 2]),
    (FreeCache(length=1, refresh=4), {}, {}, [11, 8, 7, 6, 11, 4, 3, 2]),
    (PromptPrefill(), {}, {}, [11] + [8] * 7),
    (PromptPrefill(), {}, {"logit_shift": 1}, [11] + [9] * 7),
    (Recap(plain_steps=2), {"blocks": Fixed(length=8)}, {}, [11, 11, 11, 2, 11, 2, 11, 2]),
    (Recap(plain_steps=0, local_steps=2), {"blocks": Fixed(length=8)}, {}, [11, 3, 3, 11, 3, 3, 11, 2]),
    (Recap(plain_steps=1), {}, {}, [11, 11, 2, 11, 11, 11, 2, 11]),
    (
        Recap(plain_steps=0),
        {"blocks": Fixed(length=8), "unmask": MaskGIT(steps=4, schedule="linear")},
        {},
        [11, 4, 11, 4],
    ),
    (
        SimilarityCache(prompt_refresh=4, answer_refresh=3, share=0.5),
        {"blocks": Fixed(length=8)},
        {},
        [11, 8, 7, 8, 9, 6, 8, 5],
    ),
    (Refresh(), {}, {}, [11, 7, 7, 7, 11, 7, 7, 7]),
    (Refresh(prompt_refresh=3, answer_at_block=False), {}, {}, [11, 4, 4, 7, 5, 4, 7, 4]),
    (Refresh(prompt_refresh=3, answer_refresh=2, answer_at_block=False), {}, {}, [11, 4, 8, 7, 5, 7, 8, 7]),
    (
        Refresh(prompt_refresh=None, answer_at_block=False, drift_limit=1e9, probes=2),
        {},
        {},
        [11, 8, 8, 8, 9, 8, 8, 8],
    ),
    (Refresh(prompt_refresh=None, drift_limit=0.0, probes=2), {}, {}, [11, 8, 11, 11, 11, 11, 11, 11]),
]
"""Three prompt tokens and eight masks, in two blocks of four and one a step if nothing else is said."""


@pytest.mark.parametrize(("cache", "fields", "spec", "expected"), COSTS)
def test_what_is_evaluated_can_be_counted_by_hand(cache, fields, spec, expected):
    seen, decoded = sizes(llama_denoiser(**spec), [[1, 2, 3]], 8, recipe_of(cache, **fields))
    assert seen[:, 0].tolist() == expected
    assert decoded.nfe.tolist() == [len(expected)]


@pytest.mark.parametrize(("cache", "total"), [(DualCache(), 4992), (PrefixCache(), 10944)])
def test_costs_of_a_longer_answer(denoiser, cache, total):
    """128 after 128 in blocks of 32: blocks x (256 + 31 x 32), and blocks x 256 + 31 x (128 + 96 + 64 + 32)."""
    decoded = decode(denoiser, [[5] * 128], 128, recipe_of(cache, blocks=Fixed(length=32)))
    assert decoded.token_forwards.tolist() == [total]
    assert not decoded.exact


def reference(model, prompt, length, block, dual):
    """Fast-dLLM for one row with transformers' own cache: what is kept is cut out of it and goes before the queries."""
    x = torch.tensor([prompt + [23] * length])
    size, every = x.shape[1], []

    def run(columns, past, kept):
        cache = DynamicCache()
        for layer in range(len(past.layers) if past else 0):
            cache.update(past.layers[layer].keys[:, :, kept], past.layers[layer].values[:, :, kept], layer)
        mask = torch.ones(1, 1, len(columns), len(columns) + len(kept), dtype=torch.bool)
        out = model(x[:, columns], attention_mask=mask, position_ids=columns[None], past_key_values=cache)
        open_ = (columns >= start) & (columns < start + block) & (x[0, columns] == 23)
        logits = out.logits[0, open_].detach()
        every.append(logits)
        best, tokens = logits[:, :23].softmax(-1).max(-1)
        x[0, columns[open_][best.argmax()]] = tokens[best.argmax()]
        return cache

    columns = torch.arange(size)
    for start in range(len(prompt), size, block):
        past = run(columns, None, columns[:0])
        inner = (columns >= start) & (columns < start + block if dual else True)
        while (x[0, start : start + block] == 23).any():
            run(columns[inner], past, columns[~inner])
    return x, every


@pytest.mark.parametrize("dual", [False, True], ids=["prefix", "dual"])
def test_prefix_and_dual_are_those_of_a_loop_with_the_cache_of_transformers(denoiser, dual):
    prompt = [3, 4, 5, 6]
    with torch.no_grad():
        tokens, expected = reference(denoiser.model, prompt, 12, 4, dual)
    cache = DualCache() if dual else PrefixCache()
    decoded, steps = recorded(decode, denoiser, [prompt], 12, recipe_of(cache, unmask=Quota(tokens=1)))
    assert torch.equal(decoded.tokens, tokens)
    for (_, logits, _), other in zip(steps, expected, strict=True):
        torch.testing.assert_close(logits, other, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_prompt_by_itself_is_a_prefill_with_the_cache_of_transformers(shift):
    """With a shift the last token of the prompt goes with the answer, since it predicts the first one."""
    denoiser, prompt = llama_denoiser(logit_shift=shift), [3, 4, 5, 6]
    kept = len(prompt) - shift
    cache = recipe_of(PromptPrefill(), unmask=Quota(tokens=2), blocks=Fixed(length=6))

    def compare(state):
        def run(columns, past, seen):
            mask = torch.ones(1, 1, len(columns), seen, dtype=torch.bool)
            ids, positions = state.x[:, columns], columns[None]
            return denoiser.model(ids, attention_mask=mask, position_ids=positions, past_key_values=past).logits[0]

        past, columns = DynamicCache(), torch.arange(len(prompt) + 6)
        run(columns[:kept], past, kept)
        logits = run(columns[kept:], past, len(columns))
        torch.testing.assert_close(state.raw, logits[state.at[1] - shift - kept], atol=3e-5, rtol=1e-5)

    assert decode(denoiser, [prompt], 6, cache, watch=compare).steps.tolist() == [3]


@pytest.mark.parametrize("label", [label for label, cache in CASES["cache"].items() if label not in ("none", "output")])
def test_what_a_remask_policy_reopens_is_evaluated_at_once(denoiser, label):
    """A token that is taken back loses its keys and values, whatever the cache keeps."""
    unmask = Order() if label == "dkv-greedy" else Quota(tokens=1)
    recipe = Recipe(blocks=Fixed(length=8), unmask=unmask, remask=TakeBack(), cache=CASES["cache"][label])
    before, reopened = [], []

    def watch(state):
        if before:
            mine = (state.x == 23) & (before[-1] != 23)
            reopened.append(mine.sum(1))
            assert (state.age[mine] == 0).all()
            assert state.stored[mine].all()
        before.append(state.x.clone())

    decoded = decode(denoiser, PROMPTS, 8, recipe, watch=watch)
    assert torch.stack(reopened).sum(0).tolist() == [1] * 7
    assert not (decoded.answers == 23).any()
    assert decoded.exact or not recipe.cache.exactness(denoiser.spec)


SWEEPS = {
    "prefix": lambda every: PrefixCache(refresh=every),
    "dual": lambda every: DualCache(refresh=every),
    "dkv": lambda every: DkvCache(refresh=every),
    "dkv-greedy": lambda every: DkvGreedy(refresh=every, window=1),
    "free": lambda every: FreeCache(refresh=every, length=2),
    "similarity": lambda every: SimilarityCache(prompt_refresh=every, answer_refresh=every),
    "refresh": lambda every: Refresh(prompt_refresh=every, answer_refresh=every, answer_at_block=False),
}


@pytest.mark.parametrize("cache", SWEEPS.values(), ids=list(SWEEPS))
def test_agreement_along_a_trajectory_rises_to_one_as_the_interval_falls(denoiser, cache):
    """The surest tokens of no cache and of the cache, at the positions that both know."""
    recipe = recipe_of({"type": "none"}, blocks=Fixed(length=8), unmask=Order(tokens=1))
    plain, steps = recorded(decode, denoiser, PROMPTS, 8, recipe)
    agreements, costs = [], []
    for every in (8, 4, 2, 1):
        lazy, others = recorded(decode, denoiser, PROMPTS, 8, recipe.replace(cache=cache(every)), follow=plain)
        same = [
            (whole[known[all_known]].argmax(1) == part.argmax(1)).float()
            for (all_known, whole, _), (known, part, _) in zip(steps, others, strict=True)
        ]
        agreements.append(torch.cat(same).mean().item())
        costs.append(lazy.token_forwards.sum().item())
        assert lazy.exact == (every == 1)
    assert agreements == sorted(agreements)
    assert costs == sorted(costs)
    assert agreements[0] < agreements[-1] == 1


def test_the_probe_finds_what_has_changed_and_nothing_else():
    """A prompt that cannot see the answer never drifts; a block that was last seen with a mask does, once."""
    cache = Refresh(prompt_refresh=None, drift_limit=1e-4, probes=1)
    seen, _ = sizes(llama_denoiser(**ANSWER), [[1, 2, 3]], 8, recipe_of(cache))
    assert seen[:, 0].tolist() == [7, 5, 5, 5, 9, 9, 6, 6]
    seen, _ = sizes(llama_denoiser(), [[1, 2, 3]], 8, recipe_of(cache))
    assert seen[:, 0].tolist() == [11, 6, 11, 11, 11, 11, 11, 11]


def test_drift_refreshes_the_prompt_of_the_rows_that_drift(denoiser):
    """Row by row, the measured drift of one step against what the next one evaluates."""
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1]
    limit, due, mixed = 0.12, None, 0
    cache = Refresh(prompt_refresh=None, drift_limit=limit, probes=1)

    def watch(state):
        nonlocal due, mixed
        prompt = state.present & ~state.editable
        evaluated = (prompt & (state.age == 0)).sum(1)
        if due is not None:
            assert torch.equal(evaluated, torch.where(due, prompt.sum(1), 1))
            mixed += bool(due.any() and not due.all())
        if int(state.step[0]) > 0:
            due = (state.drift * prompt).amax(1) > limit

    decode(denoiser, prompts, 8, recipe_of(cache), watch=watch)
    assert mixed > 1


def test_probes_take_turns(denoiser):
    """Nine prompt tokens, two a step: all but one within four steps, the neighbours of a step far apart."""
    cache, turns = Refresh(prompt_refresh=None, drift_limit=1e9, probes=2), []
    recipe = recipe_of(cache, blocks=Fixed(length=6))
    decode(denoiser, [list(range(1, 10))], 6, recipe, watch=lambda state: turns.append(state.age[0, :9] == 0))
    probed = [turn.nonzero()[:, 0].tolist() for turn in turns[1:5]]
    assert len({place for pair in probed for place in pair}) == 8
    assert all(later - earlier > 1 for earlier, later in probed)


@pytest.mark.parametrize(("fields", "words"), [
    ({"cache": DkvGreedy(), "unmask": Quota(tokens=1)}, "the quota policy does not say that in advance; use the"),
    ({"cache": Recap(), "unmask": Threshold()}, "the threshold policy does not know how many it will take; use a"),
    ({"cache": {"type": "refresh", "prompt_refresh": None}}, "the prompt stays frozen; give one of them"),
    ({"cache": {"type": "dual", "refresh": 0}}, "greater than or equal to 1; got 0"),
])  # fmt: skip
def test_caches_that_cannot_work_with_the_rest_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        Recipe(**({"unmask": Quota(tokens=1)} | fields))


def test_groups_of_no_local_steps_need_no_quota():
    assert Recipe(unmask=Threshold(), cache=Recap(local_steps=0)).cache.exactness(FULL)


@pytest.mark.parametrize(("name", "cache", "blocks"), [
    ("fast-dllm-prefix", PrefixCache(), Fixed(length=32)),
    ("fast-dllm-dual", DualCache(), Fixed(length=32)),
    ("fast-dllm-v2", BlockPrefix(), Nested(length=None, inner=8)),
    ("fast-dllm-v2-sub-block", SubBlockCache(), Nested(length=None, inner=8)),
    ("dimple-prefill", PromptPrefill(), Whole()),
    ("dkv", DkvCache(refresh=8), Fixed(length=64)),
    ("recap", Recap(plain_steps=12, local_steps=1), Whole()),
    ("dllm-cache", SimilarityCache(prompt_refresh=100, answer_refresh=7, share=0.25), Whole()),
])  # fmt: skip
def test_presets_with_caches(name, cache, blocks):
    assert (RECIPES[name].name, RECIPES[name].cache, RECIPES[name].blocks) == (name, cache, blocks)


def test_an_order_from_the_left_and_a_drawn_one(denoiser):
    left = decode(denoiser, PROMPTS, 6, Recipe(unmask=Order(tokens=2, random=False)))
    assert left.reveal_step[:, -6:].tolist() == [[0, 0, 1, 1, 2, 2]] * 7
    drawn = decode(denoiser, [[1]] * 300, 3, Recipe(unmask=Order()))
    orders, counts = drawn.reveal_step[:, -3:].unique(dim=0, return_counts=True)
    assert len(orders) == 6
    assert ((counts - 50).abs() < 3 * (300 * 5 / 36) ** 0.5).all()
