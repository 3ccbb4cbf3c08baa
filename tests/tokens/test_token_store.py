"""The store of keys and values, the plans over it, and caches that reuse outputs."""

from typing import ClassVar, Literal

import oracles
import pytest
import torch
from token_models import BLOCK_CAUSAL, MASK, PROMPTS, llama_denoiser, recorded

from fewstep.samplers import InputError
from fewstep.samplers.tokens import (
    CachePlan,
    CallableDenoiser,
    Choice,
    DenoiserSpec,
    Fixed,
    PolicyError,
    Proposal,
    Quota,
    Recipe,
    RefreshAll,
    Remask,
    TokenCache,
    TokenGuidance,
    Unmask,
    decode,
)

SAMPLED = Proposal(temperature=0.7, top_k=10, top_p=0.9)
RECIPE = Recipe(blocks=Fixed(length=4), unmask=Quota(tokens=2), propose=SAMPLED)


class BlockPrefix(TokenCache):
    """What depends on nothing that has changed stays: finished blocks of a block-causal denoiser."""

    type: Literal["test-block-prefix"] = "test-block-prefix"

    def plan(self, state):
        return CachePlan(query=state.sources(state.open) | (state.reach(state.open) & ~state.fresh))

    def exactness(self, spec):
        return True


class Delayed(TokenCache):
    """Positions committed before the last step keep keys and values, computed once since; all anew in turn."""

    type: Literal["test-delayed"] = "test-delayed"
    every: int

    def plan(self, state):
        due = (state.block_step % self.every == 0)[:, None]
        settled = state.stored & ~state.stale & ~state.masked
        return CachePlan(query=state.present & (due | ~settled), probe=True)

    def exactness(self, spec):
        return False


class PromptFirst(TokenCache):
    """The prompt sees itself only, so that it is evaluated once."""

    type: Literal["test-prompt-first"] = "test-prompt-first"

    def plan(self, state):
        prompt = state.present & ~state.editable
        visible = state.present[:, None] & ~(prompt[:, :, None] & ~prompt[:, None])
        return CachePlan(query=state.editable, visible=visible)

    def exactness(self, spec):
        return False


class Sloth(TokenCache):
    """Wrong in a way that is asked for."""

    type: Literal["test-sloth"] = "test-sloth"
    keeps: ClassVar[Literal["nothing", "logits", "kv"]] = "kv"
    query: str

    def plan(self, state):
        if self.query == "prompt" and state.step.max() > 0:
            return CachePlan(query=state.present & ~state.editable)
        return CachePlan(query=state.present & (state.step == 0)[:, None])

    def exactness(self, spec):
        return False


class Boaster(Delayed):
    """Says that it is exact."""

    def exactness(self, spec):
        return True


class Sloppy(Sloth):
    """Reuses the logits of rows that changed."""

    keeps: ClassVar[Literal["nothing", "logits", "kv"]] = "logits"


class Rarely(Unmask):
    """The surest candidate of each row, in half of its steps."""

    type: Literal["test-rarely"] = "test-rarely"
    paced: ClassVar[bool] = True

    def select(self, state):
        best = state.confidence("prob") == state.confidence("prob").amax(1, keepdim=True)
        return best & state.candidates & (state.uniform("selection")[:, -1:] < 0.5)

    def limit(self, generated):
        return 100 * generated


class TakeBack(Remask):
    """Opens the leftmost committed token of each row once more, in its third step."""

    type: Literal["test-take-back"] = "test-take-back"

    def select(self, state, committed):
        mine = state.editable & ~state.masked & ~committed & (state.step == 2)[:, None]
        return Choice(mine & (mine.long().cumsum(1) == 1), torch.full_like(state.x, state.spec.mask_id))

    def limit(self, generated):
        return generated


def assert_same_logits(one, other, tolerance):
    assert len(one) == len(other)
    for (known, logits, _), (known_too, logits_too, _) in zip(one, other, strict=True):
        assert torch.equal(known, known_too)
        assert (logits - logits_too).abs().max() <= tolerance


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("spec", [{}, BLOCK_CAUSAL], ids=["full", "block-causal"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["batch-1", "batch-7"])
def test_everything_through_the_store_is_no_cache(prompts, spec, shift):
    denoiser = llama_denoiser(logit_shift=shift, **spec)
    plain, steps = recorded(decode, denoiser, prompts, 10, RECIPE)
    stored, stored_steps = recorded(decode, denoiser, prompts, 10, RECIPE.replace(cache=RefreshAll()))
    assert torch.equal(plain.tokens, stored.tokens)
    assert torch.equal(plain.token_forwards, stored.token_forwards)
    assert_same_logits(steps, stored_steps, 0 if len(prompts) == 1 and not spec else 2e-5)
    assert plain.exact
    assert stored.exact
    assert (plain.kv_bytes, stored.kv_bytes) == (0, 2 * 2 * len(prompts) * 2 * (plain.tokens.shape[1] + 1) * 8 * 4)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("anchor", ["sequence", "answer"])
@pytest.mark.parametrize("remask", [{"type": "none"}, TakeBack()], ids=["keep", "remask"])
def test_a_prefix_of_final_blocks_is_exact_for_a_block_causal_denoiser(anchor, shift, remask):
    denoiser = llama_denoiser(logit_shift=shift, block_anchor=anchor, **BLOCK_CAUSAL)
    recipe = RECIPE.replace(blocks=Fixed(length=None), remask=remask)
    plain, steps = recorded(decode, denoiser, PROMPTS, 12, recipe)
    cached, cached_steps = recorded(decode, denoiser, PROMPTS, 12, recipe.replace(cache=BlockPrefix()))
    assert torch.equal(plain.tokens, cached.tokens)
    assert_same_logits(steps, cached_steps, 2e-5)
    assert cached.exact
    assert (cached.token_forwards < plain.token_forwards).all()


def test_a_cache_that_refreshes_every_step_is_no_cache_and_a_lazier_one_costs_less():
    denoiser = llama_denoiser()
    plain, steps = recorded(decode, denoiser, PROMPTS, 8, RECIPE)
    fresh, fresh_steps = recorded(decode, denoiser, PROMPTS, 8, RECIPE.replace(cache=Delayed(every=1)))
    assert torch.equal(plain.tokens, fresh.tokens)
    assert_same_logits(steps, fresh_steps, 2e-5)
    assert fresh.exact
    lazy = decode(denoiser, PROMPTS, 8, RECIPE.replace(cache=Delayed(every=4)))
    assert (lazy.token_forwards < plain.token_forwards).all()
    assert not lazy.exact


def test_queries_of_a_delayed_cache_by_hand():
    """One row, three prompt tokens and four masks, one a step: masks and the token committed last are computed."""
    recipe = Recipe(unmask=Quota(tokens=1), cache=Delayed(every=9))
    sizes, drifts = [], []

    def watch(state):
        sizes.append(int((state.age == 0).sum()))
        drifts.append(state.drift.clone())

    decoded = decode(llama_denoiser(), [[1, 2, 3]], 4, recipe, watch=watch)
    assert sizes == [7, 4, 3, 2]
    assert decoded.token_forwards.tolist() == [16]
    assert drifts[0].max() == 0
    assert [int((drift > 0).sum()) for drift in drifts] == [0, 4, 3, 2]


class PromptEvery(TokenCache):
    """The block in every step, the prompt in every ``steps``-th."""

    type: Literal["test-prompt-every"] = "test-prompt-every"
    steps: int

    def plan(self, state):
        return CachePlan(query=state.in_block | (~state.editable & (state.age >= self.steps)))

    def exactness(self, spec):
        return False


@pytest.mark.parametrize(("steps", "sizes"), [(1, [11, 7, 7, 7]), (2, [11, 4, 7, 4]), (3, [11, 4, 4, 7])])
def test_ages_count_the_steps_since_the_evaluation(steps, sizes):
    recipe = Recipe(blocks=Fixed(length=4), unmask=Quota(tokens=1), cache=PromptEvery(steps=steps))
    seen = []
    decode(llama_denoiser(), [[1, 2, 3]], 8, recipe, watch=lambda state: seen.append(int((state.age == 0).sum())))
    assert seen[:4] == sizes


def test_a_prompt_that_sees_itself_only_is_evaluated_once():
    denoiser = llama_denoiser()
    recipe = Recipe(unmask=Quota(tokens=2), cache=PromptFirst())
    decoded, steps = recorded(decode, denoiser, PROMPTS, 4, recipe)
    assert not decoded.exact
    assert decoded.token_forwards.tolist() == [len(prompt) + 8 for prompt in PROMPTS]
    causal = llama_denoiser(attention="block-causal", block_length=4, block_anchor="answer")
    plain, plain_steps = recorded(decode, causal, PROMPTS, 4, Recipe(unmask=Quota(tokens=2)))
    assert torch.equal(decoded.tokens, plain.tokens)
    assert_same_logits(steps, plain_steps, 2e-5)


def test_guidance_keeps_a_store_for_each_branch():
    denoiser = llama_denoiser()
    recipe = RECIPE.replace(logits=TokenGuidance(scale=2.0))
    plain = decode(denoiser, PROMPTS, 8, recipe)
    stored = decode(denoiser, PROMPTS, 8, recipe.replace(cache=RefreshAll()))
    assert torch.equal(plain.tokens, stored.tokens)
    assert torch.equal(plain.nfe, stored.nfe)
    assert plain.nfe.tolist() == [8] * 7


@pytest.mark.parametrize("logits", [(), TokenGuidance(scale=1.5)], ids=["plain", "guided"])
def test_rows_that_did_not_change_reuse_their_logits(logits):
    """Row by row: as many evaluations as steps after a change, and the same tokens."""
    denoiser = llama_denoiser()
    recipe = Recipe(unmask=Rarely(), propose=SAMPLED, logits=logits)
    plain = decode(denoiser, PROMPTS, 6, recipe, seeds=4)
    reused = decode(denoiser, PROMPTS, 6, recipe.replace(cache={"type": "output"}), seeds=4)
    assert torch.equal(plain.tokens, reused.tokens)
    assert torch.equal(plain.reveal_step, reused.reveal_step)
    assert reused.exact
    each = 2 if logits else 1
    assert plain.nfe.tolist() == (each * plain.steps).tolist()
    assert reused.nfe.tolist() == [each * len(set(row.tolist()) - {-1}) for row in reused.reveal_step]
    assert len(set(plain.nfe.tolist())) > 2


def test_one_logits_trajectory_can_be_followed_by_another_recipe():
    denoiser = llama_denoiser()
    plain, steps = recorded(decode, denoiser, PROMPTS, 8, RECIPE)
    lazy = RECIPE.replace(cache=Delayed(every=4), propose=Proposal())
    followed, other = recorded(decode, denoiser, PROMPTS, 8, lazy, follow=plain)
    assert torch.equal(plain.tokens, followed.tokens)
    assert torch.equal(plain.reveal_step, followed.reveal_step)
    differences = [(a - b).abs().max().item() for (_, a, _), (_, b, _) in zip(steps, other, strict=True)]
    assert differences[0] <= 1e-5 < differences[1]
    with pytest.raises(InputError, match="of other prompts or another length"):
        decode(denoiser, PROMPTS, 9, lazy, follow=plain)
    with pytest.raises(InputError, match="cannot be followed with the test-take-back remask policy; use none"):
        decode(denoiser, PROMPTS, 8, lazy.replace(remask=TakeBack()), follow=plain)


def test_caches_that_the_denoiser_cannot_serve_are_refused():
    oracle = oracles.copy()
    with pytest.raises(InputError, match="refresh-all cache keeps keys and values, which CallableDenoiser has none of"):
        decode(oracle.denoiser(), oracle.prompts(1), 6, Recipe(unmask=Quota(tokens=1), cache=RefreshAll()))
    timed = CallableDenoiser(lambda ids, time: ids, DenoiserSpec(mask_id=MASK, vocab_size=24, time_conditioned=True))
    with pytest.raises(InputError, match="this denoiser is told the time; use cache none"):
        decode(timed, [[1]], 6, Recipe(unmask=Quota(tokens=1), cache={"type": "output"}))


@pytest.mark.parametrize(("cache", "words"), [
    (Sloth(query="nothing"), "test-sloth cache queries nothing in a live row"),
    (Sloth(query="prompt"), "test-sloth cache evaluates no open position of row 0"),
    (Boaster(every=3), "test-delayed cache says that it is exact, but leaves logits out or reads outdated keys"),
    (Sloppy(query="nothing"), "reuses logits of a row that has changed"),
])  # fmt: skip
def test_a_cache_that_does_not_do_what_it_should_is_stopped(cache, words):
    with pytest.raises(PolicyError, match=words):
        decode(llama_denoiser(), [[1, 2]], 4, Recipe(unmask=Quota(tokens=1), cache=cache))
