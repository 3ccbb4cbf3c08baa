"""Scorers with an autoregressive model beside the loop, against laws that can be enumerated."""

from itertools import product

import pytest
import torch
from scipy.stats import chisquare
from token_models import MASK, PROMPTS, VOCABULARY, llama_denoiser, tiny_llama

from fewstep.samplers import InputError
from fewstep.samplers.tokens import (
    CallableCausal,
    CallableDenoiser,
    DenoiserSpec,
    Dfa,
    DualCache,
    Edit,
    Energy,
    Fixed,
    Guider,
    Order,
    Prophet,
    Proposal,
    Quota,
    Recipe,
    Speculative,
    TransformersCausal,
    decode,
)
from fewstep.samplers.tokens.causal import CausalReader
from fewstep.samplers.tokens.state import DecodeState

SPEC = DenoiserSpec(mask_id=3, vocab_size=3)
SAMPLED = Proposal(temperature=1.0)
BIGRAM = torch.tensor([[0.2, -1.0, 1.1], [0.9, 0.4, -0.7], [-0.5, 1.3, 0.1]], dtype=torch.float64)
DRAFT = torch.tensor([[0.5, 0.1, -0.4], [-0.8, 0.6, 0.2], [0.3, 0.3, -1.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
"""Logits of the draft by position; each visible token turns those of all positions."""
AR = CallableCausal(lambda ids: BIGRAM[ids], 3, bos_id=1)
FROM_LEFT = Order(tokens=2, random=False)


def drafted(ids):
    """(R, n, 3): other marginals at each position, that depend on what is visible."""
    visible = torch.where(ids == 3, 0, ids + 1).sum(1).double()
    return DRAFT[: ids.shape[1]] * torch.cos(visible)[:, None, None] + DRAFT[: ids.shape[1]].roll(1, 1)


TOY = CallableDenoiser(drafted, SPEC)
FLAT = CallableDenoiser(lambda ids: torch.zeros(*ids.shape, 3, dtype=torch.float64), SPEC)
OUTCOMES = list(product(range(3), repeat=3))


def law(logits=BIGRAM, bos=1):
    """Probability of each outcome of three tokens under the bigram model."""
    p = logits.softmax(-1)
    return torch.stack([p[bos, a] * p[a, b] * p[b, c] for a, b, c in OUTCOMES])


def chi_square(answers, expected):
    """p-value of the outcomes of rows."""
    number = (answers * torch.tensor([9, 3, 1])).sum(1)
    counts = torch.bincount(number, minlength=27).double()
    assert (counts[expected == 0] == 0).all()
    some = expected > 0
    return chisquare(counts[some].numpy(), (expected[some] / expected.sum() * len(answers)).numpy()).pvalue


def recipe(scorer, unmask=FROM_LEFT, propose=SAMPLED, **slots):
    return Recipe(unmask=unmask, propose=propose, scorer=scorer, **slots)


DRAWN = {"as is": SAMPLED, "filtered": Proposal(temperature=0.4, top_k=2), "greedy": Proposal()}


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("propose", DRAWN.values(), ids=DRAWN)
def test_speculation_has_the_law_of_its_target(tokens, propose):
    """Whatever the draft is drawn from, if its probability is the one it was drawn with."""
    how = recipe(Speculative(), Order(tokens=tokens, random=False), propose)
    decoded = decode(TOY, [[]] * 3000, 3, how, seeds=tokens * 10_000, resources={"ar": AR})
    assert chi_square(decoded.answers, law()) > 0.01
    assert decoded.nfe.min() < 3 or tokens == 1
    assert torch.equal(decoded.scorer_nfe, decoded.nfe)


def test_speculation_has_the_law_of_a_tempered_and_filtered_target():
    target = Proposal(temperature=0.7, top_k=2)
    decoded = decode(TOY, [[]] * 3000, 3, recipe(Speculative(target=target)), seeds=50, resources={"ar": AR})
    assert chi_square(decoded.answers, law(target.probs(BIGRAM).log())) > 0.01


def test_speculation_in_blocks_and_after_prompts_of_different_lengths():
    prompts = [[2]] * 1500 + [[0, 1, 2]] * 1500
    how = recipe(Speculative(), blocks=Fixed(length=2))
    decoded = decode(TOY_OF_FOUR, prompts, 3, how, resources={"ar": CallableCausal(lambda ids: BIGRAM[ids], 3)})
    assert chi_square(decoded.answers, law(bos=2)) > 0.01


TOY_OF_FOUR = CallableDenoiser(lambda ids: DRAFT[torch.arange(ids.shape[1]) % 4].expand(len(ids), -1, -1), SPEC)


def test_a_wrong_law_is_found_out():
    """The test has the power to tell drafts from the target."""
    decoded = decode(TOY, [[]] * 3000, 3, Recipe(unmask=FROM_LEFT, propose=SAMPLED))
    assert chi_square(decoded.answers, law()) < 1e-6


def test_a_draft_like_its_target_is_accepted_whole_and_earns_one_more():
    same = CallableDenoiser(lambda ids: BIGRAM[1].expand(*ids.shape, 3), SPEC)
    flat = CallableCausal(lambda ids: BIGRAM[1].expand(*ids.shape, 3), 3, bos_id=0)
    decoded = decode(same, [[]] * 50, 9, recipe(Speculative()), resources={"ar": flat})
    assert decoded.nfe.tolist() == [3] * 50


@pytest.mark.parametrize("cache", [{"type": "none"}, DualCache()], ids=["none", "dual"])
def test_greedy_speculation_is_greedy_decoding_of_the_target(cache):
    """A tiny Llama over its cache of keys and values, beside another, against its own generate."""
    model = tiny_llama()
    how = recipe(Speculative(target=Proposal()), Order(tokens=3, random=False), Proposal(), cache=cache)
    prompts = [prompt for prompt in PROMPTS if prompt]
    denoiser = llama_denoiser()
    decoded = decode(denoiser, prompts, 9, how, resources={"ar": TransformersCausal(model)})
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        for _ in range(9):
            logits = model(ids).logits[0, -1].clone()
            logits[MASK] = -torch.inf
            ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
        assert decoded.answers[row].tolist() == ids[0, len(prompt) :].tolist()
    full = 9 * decoded.scorer_nfe + torch.tensor([len(prompt) for prompt in prompts])
    assert (decoded.scorer_token_forwards < full).all()


def test_a_reader_with_keys_and_values_reads_what_one_without_reads():
    """Over random changes of random rows, at the front and at the end, for two copies of each row."""
    torch.manual_seed(0)
    model = TransformersCausal(tiny_llama(), bos_id=0)
    plain = TransformersCausal(tiny_llama(), bos_id=0)
    plain.keeps_kv = False
    first = torch.tensor([0, 3, 1])
    x = torch.randint(0, VOCABULARY - 1, (3, 10))
    state = DecodeState(llama_denoiser().spec, Recipe(unmask=FROM_LEFT), x, first, 4, (1, 2, 3))
    readers = [CausalReader(each, state, copies=2) for each in (model, plain)]
    tokens = x.repeat_interleave(2, dim=0)
    starts = first.repeat_interleave(2)[:, None]
    costs = []
    for step in range(8):
        change = torch.rand(tokens.shape) < (0.1 if step % 2 else 0.0)
        tokens = torch.where(change, torch.randint(0, VOCABULARY - 1, tokens.shape), tokens)
        wanted = (
            (torch.rand(tokens.shape) < 0.3) & (torch.arange(10) >= starts) & (torch.arange(6) != step % 6)[:, None]
        )
        before = state.scorer_token_forwards.clone()
        cached, anew = (reader.read(state, tokens, wanted) for reader in readers)
        costs.append(state.scorer_token_forwards - before)
        torch.testing.assert_close(cached, anew, atol=2e-4, rtol=1e-4)
        assert (cached[:, MASK] == -torch.inf).all()
        assert len(cached) == wanted.sum()
    assert state.scorer_nfe.sum() > 0
    assert torch.stack(costs).sum() > 0


def test_energy_of_two_completions_has_the_law_of_importance_sampling():
    """P(x) = sum over pairs of q(x1) q(x2) w / (w1 + w2), enumerated."""
    q = (DRAFT[:3] + DRAFT[:3].roll(1, 1)).softmax(-1)
    proposal = torch.stack([q[0, a] * q[1, b] * q[2, c] for a, b, c in OUTCOMES])
    for temperature in (1.0, 0.5):
        weight = (law() / proposal) ** (1 / temperature)
        share = weight[:, None] / (weight[:, None] + weight[None])
        expected = 2 * (proposal[:, None] * proposal[None] * share).sum(1)
        torch.testing.assert_close(expected.sum(), torch.tensor(1.0, dtype=torch.float64))
        scorer = Energy(samples=2, temperature=temperature, start=1, end=0)
        decoded = decode(TOY, [[]] * 3000, 3, recipe(scorer, Quota(tokens=3)), resources={"ar": AR})
        assert chi_square(decoded.answers, expected) > 0.01
        assert decoded.scorer_nfe.tolist() == [2] * 3000


def test_energy_of_many_completions_approaches_the_law_given_what_is_visible():
    """The middle token is given: what follows it counts as much as what comes before."""
    given = torch.tensor([[3, 2, 3]]).expand(1200, -1)
    scorer = Energy(samples=60, start=1, end=0)
    decoded = decode(FLAT, given, 0, recipe(scorer, Quota(tokens=2)), resources={"ar": AR})
    expected = law() * torch.tensor([float(b == 2) for _, b, _ in OUTCOMES])
    counts = torch.bincount((decoded.tokens * torch.tensor([9, 3, 1])).sum(1), minlength=27) / 1200
    forgetful = expected / BIGRAM.softmax(-1)[[a for a, _, _ in OUTCOMES], [b for _, b, _ in OUTCOMES]]
    near, far = (0.5 * (counts - each / each.sum()).abs().sum() for each in (expected, forgetful))
    assert near < 0.06 < far


def test_energy_prefers_what_the_model_finds_likely_in_every_row_of_a_batch():
    """The model wants the prompt's token all over; the denoiser does not care."""
    likes = CallableCausal(lambda ids: 6.0 * torch.nn.functional.one_hot(ids[:, :1].expand_as(ids), 3).double(), 3)
    prompts = [[row % 3] for row in range(60)]
    decoded = decode(
        FLAT, prompts, 2, recipe(Energy(samples=30, start=1, end=0), Quota(tokens=2)), resources={"ar": likes}
    )
    same = (decoded.answers == torch.tensor(prompts)).double().mean(0)
    assert (same > 0.85).all()


def test_energy_weighs_within_its_window_only():
    how = recipe(Energy(samples=3), Quota(tokens=1))
    decoded = decode(TOY_OF_FOUR, [[]] * 5, 4, how, resources={"ar": AR})
    assert decoded.scorer_nfe.tolist() == [3] * 5  # a share of 2 in 4 lies between 0.4 and 0.6


@pytest.mark.parametrize("name", ["edlm", "flashdlm", "specdiff"])
def test_presets_run_with_a_model_beside_them(name):
    decoded = decode(llama_denoiser(), PROMPTS, 12, name, resources={"ar": TransformersCausal(tiny_llama(), bos_id=0)})
    assert not (decoded.answers == MASK).any()
    assert (decoded.scorer_nfe > 0).all()
    assert decoded.exact == (name != "flashdlm")


def forced(*tokens):
    """A denoiser that drafts these, and nothing else is close."""
    logits = 9.0 * torch.nn.functional.one_hot(torch.tensor(tokens), 3).double()
    return CallableDenoiser(lambda ids: logits.expand(len(ids), -1, -1), SPEC)


@pytest.mark.parametrize(("rule", "steps"), [
    ({"top_k": 1}, [0, 0, 1, 2]),
    ({"top_k": 2}, [0, 0, 0, 1]),
    ({"top_k": 3}, [0, 0, 0, 0]),
    ({"top_k": 2, "relative": 0.5}, [0, 0, 1, 2]),
    ({"relative": 0.35}, [0, 0, 0, 1]),
    ({"threshold": 0.3}, [0, 0, 1, 2]),
    ({"threshold": 0.99}, [0, 1, 2, 3]),
])  # fmt: skip
def test_a_guider_lets_the_prefix_pass_that_it_would_write(rule, steps):
    """By hand: of 0.6, 0.25 and 0.15 the drafts have the first, the first, the second and the last."""
    table = torch.tensor([[0.6, 0.25, 0.15], [0.6, 0.15, 0.25], [0.25, 0.15, 0.6]], dtype=torch.float64)
    drafts, at = [], 1
    for rank in (0, 0, 1, 2):
        at = int(table[at].argsort(descending=True)[rank])
        drafts.append(at)
    decoded = decode(
        forced(*drafts), [[]] * 2, 4, recipe(Guider(**rule), Order(tokens=4, random=False), Proposal()),
        resources={"ar": CallableCausal(lambda ids: table[ids].log(), 3, bos_id=1)},
    )  # fmt: skip
    assert decoded.answers.tolist() == [drafts] * 2
    assert decoded.reveal_step.tolist() == [steps] * 2


@pytest.mark.parametrize("scorer", [Speculative(), Guider(top_k=1), Energy()])
def test_what_a_scorer_cannot_work_with_is_refused_when_the_recipe_is_made(scorer):
    unmask = Quota(tokens=2) if scorer.type == "energy" else FROM_LEFT
    with pytest.raises(InputError, match=r"the dfa constraint.*; use one of the two"):
        recipe(scorer, unmask, constraint=Dfa(pattern="a*"))
    if scorer.type == "energy":
        with pytest.raises(InputError, match="all the same at temperature 0; give propose a temperature"):
            recipe(scorer, unmask, Proposal())
        return
    with pytest.raises(
        InputError, match=f"the {scorer.type} scorer accepts drafts from left to right, and unmask quota"
    ):
        recipe(scorer, Quota(tokens=2))
    with pytest.raises(InputError, match="unmask order chooses others; use order with random=False"):
        recipe(scorer, Order())
    with pytest.raises(InputError, match="takes it back; use remask none"):
        recipe(scorer, remask=Edit())
    with pytest.raises(InputError, match="the prophet exit commits drafts at once"):
        recipe(scorer, exit=Prophet())


@pytest.mark.parametrize(("resources", "prompt", "words"), [
    ({}, [0], "the speculative scorer needs 'ar'; hand it over with decode"),
    ({"ar": torch.nn.Linear(2, 2)}, [0], "resource 'ar' is a Linear; wrap a transformers model with Transformers"),
    ({"ar": CallableCausal(lambda ids: ids, 7)}, [0], "has 7 tokens and the denoiser 3; .* the same tokenizer"),
    ({"ar": CallableCausal(lambda ids: BIGRAM[ids], 3)}, [], "cannot say what a row without a prompt begins with"),
    ({"ar": AR}, [3, 0], "reads from left to right, and row 0 has tokens after its masks"),
])  # fmt: skip
def test_what_is_handed_over_is_looked_at(resources, prompt, words):
    with pytest.raises(InputError, match=words):
        decode(TOY_OF_FOUR, [prompt], 3, recipe(Speculative()), resources=resources)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Guider(), "accepts by top_k, relative or threshold; give at least one"),
    (lambda: Energy(start=0.2, end=0.5), "from start down to end; got start 0.2 < end 0.5"),
])  # fmt: skip
def test_fields_of_scorers(make, words):
    with pytest.raises(ValueError, match=words):
        make()
