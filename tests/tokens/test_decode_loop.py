"""What holds for every decoding, whatever the policies."""

from typing import ClassVar, Literal

import oracles
import pytest
import torch
from oracles import EOS, MASK, SPEC
from token_cases import CASES, recipes, resources
from token_models import MASK as LLAMA_MASK
from token_models import PROMPTS, llama_denoiser

from fewstep.samplers import InputError
from fewstep.samplers.tokens import (
    Ban,
    CallableDenoiser,
    Choice,
    Constraint,
    DenoiserSpec,
    Exit,
    Fixed,
    PolicyError,
    Proposal,
    Quota,
    Recipe,
    Remask,
    Scorer,
    Threshold,
    Unmask,
    decode,
)
from fewstep.samplers.tokens.slots import SLOTS

RECIPES = recipes()
LENGTH = 8


@pytest.fixture(scope="module")
def denoiser():
    return llama_denoiser()


@pytest.mark.parametrize("slot", SLOTS)
def test_every_registered_policy_has_a_case(slot):
    registry, _ = SLOTS[slot]
    types = {case["type"] if isinstance(case, dict) else case.type for case in CASES[slot].values()}
    assert types == set(registry.names())


@pytest.mark.parametrize("label", RECIPES)
def test_every_policy_keeps_to_the_rules(denoiser, label):
    recipe, shown = RECIPES[label], []
    decoded = decode(
        denoiser,
        PROMPTS,
        LENGTH,
        recipe,
        seeds=3,
        resources=resources(denoiser.spec),
        watch=lambda state: shown.append(state.candidates),
    )
    generated = torch.arange(decoded.tokens.shape[1]) >= decoded.answer_start
    for row, prompt in enumerate(PROMPTS):
        assert decoded.tokens[row, decoded.first[row] : decoded.answer_start].tolist() == list(prompt)
    assert not decoded.failed.any()
    assert not (decoded.tokens == LLAMA_MASK)[:, generated].any()
    assert ((decoded.reveal_step >= 0) == (decoded.reveal_conf >= 0)).all()
    alive = generated & (torch.arange(decoded.tokens.shape[1]) < decoded.ends[:, None])
    assert torch.equal(decoded.reveal_step >= 0, alive) or label.startswith("exit")
    last = decoded.reveal_step.amax(1) + 1
    assert (last == decoded.steps).all() or (label.startswith("remask") and (last <= decoded.steps).all())
    for step, candidates in enumerate(shown):
        assert candidates[decoded.reveal_step == step].all()
    assert (decoded.nfe <= decoded.steps * (1 + len(recipe.branches))).all()
    assert (decoded.token_forwards >= decoded.nfe).all()
    torch.testing.assert_close(decoded.tokens_per_forward, decoded.new_tokens / decoded.nfe.double())
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize("label", RECIPES)
def test_a_row_does_not_depend_on_its_batch(denoiser, label):
    options = {"resources": resources(denoiser.spec)}
    together = decode(denoiser, PROMPTS, LENGTH, RECIPES[label], seeds=[5, 6, 7, 8, 9, 10, 11], **options)
    for row in (1, 5):  # without a prompt every position is as good as the next, to the last bit
        alone = decode(denoiser, [PROMPTS[row]], LENGTH, RECIPES[label], seeds=[5 + row], **options)
        assert torch.equal(alone.answers[0], together.answers[row])
        assert torch.equal(alone.reveal_step[0, -LENGTH:], together.reveal_step[row, -LENGTH:])
        for cost in ("nfe", "token_forwards", "new_tokens", "steps"):
            assert getattr(alone, cost)[0] == getattr(together, cost)[row], cost


@pytest.mark.parametrize(
    "label", [label for label in RECIPES if RECIPES[label].cache.keeps != "kv" and "json" not in label]
)
def test_a_row_is_the_same_to_the_last_bit_where_the_denoiser_works_row_by_row(label):
    task = oracles.shuffle(4)
    prompts = torch.stack([task.prompts(1)[0], *torch.tensor([[4, 3, 2, 1], [2, 3, 1, 4], [9, 7, 5, 3]])])
    recipe, options = RECIPES[label].replace(logits=()), {"resources": resources(oracles.SPEC)}
    together = decode(task.denoiser(), prompts, 6, recipe, seeds=[1, 2, 3, 4], **options)
    for row in range(4):
        alone = decode(task.denoiser(), prompts[row : row + 1], 6, recipe, seeds=[row + 1], **options)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert torch.equal(alone.reveal_conf[0].nan_to_num(-1), together.reveal_conf[row].nan_to_num(-1))


def test_seeds_decide_and_nothing_else():
    task = oracles.shuffle()
    recipe = Recipe(unmask=Quota(tokens=3, confidence="random"), propose=Proposal(temperature=1.0))
    one = decode(task.denoiser(), task.prompts(40), 6, recipe, seeds=7)
    torch.manual_seed(99)
    again = decode(task.denoiser(), task.prompts(40), 6, recipe, seeds=range(7, 47))
    other = decode(task.denoiser(), task.prompts(40), 6, recipe, seeds=8)
    assert torch.equal(one.tokens, again.tokens)
    assert torch.equal(one.tokens[1:], other.tokens[:-1])
    assert len({tuple(row) for row in one.answers.tolist()}) > 30


def test_tokens_are_drawn_from_the_tempered_and_filtered_law():
    """1,500 draws at one position against the closed form, and confidences from the law as it is."""
    law = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    denoiser = CallableDenoiser(lambda ids: law.log().expand(*ids.shape, 4), DenoiserSpec(mask_id=9, vocab_size=4))
    for fields, expected in [
        ({"temperature": 1.0}, law),
        ({"temperature": 0.5}, law**2 / (law**2).sum()),
        ({"temperature": 1.0, "top_k": 2}, torch.tensor([4 / 7, 3 / 7, 0, 0])),
        ({"temperature": 1.0, "top_p": 0.6}, torch.tensor([4 / 7, 3 / 7, 0, 0])),
        ({"temperature": 0.0}, torch.tensor([1.0, 0, 0, 0])),
    ]:
        decoded = decode(denoiser, [[]] * 1500, 1, Recipe(unmask=Quota(tokens=1), propose=fields))
        shares = torch.bincount(decoded.tokens[:, 0], minlength=4) / 1500
        assert ((shares - expected).abs() <= 3 * (expected * (1 - expected) / 1500).sqrt()).all(), fields
        torch.testing.assert_close(decoded.reveal_conf, law[decoded.tokens])


def test_confidences_by_hand():
    law = torch.tensor([0.5, 0.25, 0.125, 0.125])
    denoiser = CallableDenoiser(lambda ids: law.log().expand(*ids.shape, 4), DenoiserSpec(mask_id=9, vocab_size=4))
    seen = {}

    def watch(state):
        for kind in ("prob", "margin", "entropy", "random"):
            seen[kind] = state.confidence(kind)
            assert torch.equal(seen[kind], state.confidence(kind))

    decode(denoiser, [[1, 9, 2]], 0, Recipe(unmask=Quota(tokens=1)), watch=watch)
    assert [seen[kind][0, 1].item() for kind in ("prob", "margin")] == [0.5, 0.25]
    assert seen["entropy"][0, 1].item() == pytest.approx(-1.75 * torch.tensor(2.0).log().item())
    assert all((confidence[0, [0, 2]] == -torch.inf).all() for confidence in seen.values())


@pytest.mark.parametrize(("steps", "length", "expected"), [
    (4, 10, [3, 3, 2, 2]), (3, 10, [4, 3, 3]), (10, 10, [1] * 10), (16, 10, [1] * 10), (1, 10, [10])
])  # fmt: skip
def test_steps_are_split_evenly(denoiser, steps, length, expected):
    decoded = decode(denoiser, [[1], [2, 3]], length, Recipe(unmask=Quota(steps=steps)))
    for row in range(2):
        assert torch.bincount(decoded.reveal_step[row, decoded.answer_start :]).tolist() == expected


def test_steps_are_split_over_blocks_of_different_sizes(denoiser):
    """The blocks of a block-causal denoiser, of which the prompt takes a part that differs by row."""
    blocked = llama_denoiser(attention="block-causal", block_length=4)
    recipe = Recipe(blocks=Fixed(length=None), unmask=Quota(steps_per_block=2))
    decoded = decode(blocked, [[1, 2], [1], []], 6, recipe)
    assert [torch.bincount(row[row >= 0]).tolist() for row in decoded.reveal_step] == [
        [1, 1, 2, 2], [2, 1, 2, 1], [2, 2, 1, 1]
    ]  # fmt: skip
    with pytest.raises(InputError, match="5 steps cannot be shared equally by 2 blocks; take a multiple of 2, or give"):
        decode(denoiser, [[1]], 8, Recipe(blocks=Fixed(length=4), unmask=Quota(steps=5)))


def test_masks_in_the_prompt_are_filled_in(denoiser):
    decoded = decode(denoiser, [[1, LLAMA_MASK, 3], [LLAMA_MASK, 5]], 2, Recipe(unmask=Threshold(threshold=0.5)))
    assert (decoded.tokens[0, 0], decoded.tokens[0, 2], decoded.tokens[1, 2]) == (1, 3, 5)
    assert (decoded.reveal_step >= 0).tolist() == [[False, True, False, True, True], [False, True, False, True, True]]


def test_banned_tokens_never_come_and_allowed_ones_alone(denoiser):
    free = decode(denoiser, PROMPTS, LENGTH, Recipe(unmask=Quota(tokens=4)))
    common = free.answers.flatten().mode().values.item()
    banned = decode(denoiser, PROMPTS, LENGTH, Recipe(unmask=Quota(tokens=4), logits=Ban(banned=(common,))))
    assert (free.answers == common).any()
    assert not (banned.answers == common).any()
    few = decode(denoiser, PROMPTS, LENGTH, Recipe(unmask=Quota(tokens=4), logits=Ban(allowed=(5, 6))))
    assert set(few.answers.unique().tolist()) == {5, 6}
    with pytest.raises(InputError, match="no token is left at some position"):
        decode(denoiser, PROMPTS, 2, Recipe(unmask=Quota(tokens=4), logits=(Ban(allowed=(5,)), Ban(banned=(5,)))))


class Idle(Unmask):
    """Nothing."""

    type: Literal["test-idle"] = "test-idle"

    def select(self, state):
        return torch.zeros_like(state.known)


class PacedIdle(Idle):
    """Nothing, for ever."""

    paced: ClassVar[bool] = True


class Greedy(Unmask):
    """More than it says, and what it must not."""

    type: Literal["test-greedy"] = "test-greedy"
    kept: bool = True

    def select(self, state):
        return torch.ones_like(state.known)

    def quota(self, state):
        return None if self.kept else torch.ones_like(state.first)


class Swap(Remask):
    """Replaces what was committed in the first step by token 11, in the second."""

    type: Literal["test-swap"] = "test-swap"
    token: int = 11

    def select(self, state, committed):
        return Choice((state.step == 1)[:, None] & (state.reveal_step != 1), torch.full_like(state.x, self.token))

    def limit(self, generated):
        return generated


class Veto(Constraint):
    """Refuses what is to be committed: gives the rows in ``lost`` up, and leaves the others what they chose."""

    type: Literal["test-veto"] = "test-veto"
    lost: tuple[int, ...] = ()
    silent: bool = False

    def filter(self, state, choice):
        rows = torch.isin(torch.arange(len(state.x)), torch.tensor(self.lost, dtype=torch.long))
        select = choice.select & ~rows[:, None]
        return Choice(select, choice.tokens, None if self.silent else rows)


class Overrule(Scorer):
    """Another token than the proposed one, at the leftmost chosen position only."""

    type: Literal["test-overrule"] = "test-overrule"
    token: int = 12

    def accept(self, state, choice):
        first = choice.select & (choice.select.long().cumsum(1) == 1)
        return Choice(first, torch.full_like(choice.tokens, self.token), choice.failed)


class Hurry(Exit):
    """All that is masked, anywhere, in the second step."""

    type: Literal["test-hurry"] = "test-hurry"

    def wants(self, state):
        return state.masked

    def all_in(self, state):
        return state.step == 1


def test_a_row_without_a_choice_commits_its_surest_candidate(denoiser):
    idle = decode(denoiser, PROMPTS, 4, Recipe(unmask=Idle()))
    surest = decode(denoiser, PROMPTS, 4, Recipe(unmask=Quota(tokens=1)))
    assert torch.equal(idle.tokens, surest.tokens)
    with pytest.raises(PolicyError, match="policies test-idle and none go on after 4 steps; raise their limit"):
        decode(denoiser, PROMPTS, 4, Recipe(unmask=PacedIdle()))


def test_choices_outside_the_active_block_are_dropped_and_quotas_held(denoiser):
    recipe = Recipe(blocks=Fixed(length=2), unmask=Greedy())
    assert decode(denoiser, PROMPTS, 4, recipe).reveal_step[:, -4:].tolist() == [[0, 0, 1, 1]] * 7
    with pytest.raises(PolicyError, match="test-greedy policy does not keep to its quota"):
        decode(denoiser, PROMPTS, 4, Recipe(unmask=Greedy(kept=False)))


def test_an_exit_may_commit_everything_beyond_the_block(denoiser):
    recipe = Recipe(blocks=Fixed(length=2), unmask=Quota(tokens=1), exit=Hurry())
    assert [sorted(row) for row in decode(denoiser, PROMPTS, 6, recipe).reveal_step[:, -6:].tolist()] == [
        [0, 1, 1, 1, 1, 1]
    ] * 7


def test_rewriting_touches_the_answer_only_and_leaves_what_was_just_committed(denoiser):
    decoded = decode(denoiser, PROMPTS, 4, Recipe(unmask=Quota(tokens=2), remask=Swap()))
    for row, prompt in enumerate(PROMPTS):
        assert decoded.tokens[row, decoded.first[row] : decoded.answer_start].tolist() == list(prompt)
        assert (decoded.answers[row][decoded.reveal_step[row, -4:] == 0] == 11).all()
    again = decode(denoiser, PROMPTS, 4, Recipe(unmask=Quota(tokens=2), remask=Swap(token=LLAMA_MASK)))
    assert [sorted(row) for row in again.reveal_step[:, -4:].tolist()] == [[1, 1, 2, 2]] * 7
    assert again.nfe.tolist() == [3] * 7


def test_rows_that_a_constraint_gives_up_fail_alone(denoiser):
    recipe = Recipe(unmask=Quota(tokens=2))
    free = decode(denoiser, PROMPTS, 4, recipe)
    some = decode(denoiser, PROMPTS, 4, recipe.replace(constraint=Veto(lost=(2, 5))))
    kept = [row for row in range(7) if row not in (2, 5)]
    assert some.failed.tolist() == [row in (2, 5) for row in range(7)]
    assert torch.equal(some.tokens[kept], free.tokens[kept])
    assert (some.answers[[2, 5]] == LLAMA_MASK).all()
    assert some.nfe[[2, 5]].tolist() == [1, 1]
    with pytest.raises(PolicyError, match="row 2 makes no progress: the test-veto constraint or the none scorer"):
        decode(denoiser, PROMPTS, 4, recipe.replace(constraint=Veto(lost=(2,), silent=True)))


def test_a_scorer_has_the_last_word(denoiser):
    decoded = decode(denoiser, PROMPTS, 4, Recipe(unmask=Quota(tokens=2), scorer=Overrule()))
    assert (decoded.answers == 12).all()
    assert decoded.nfe.tolist() == [4] * 7
    with pytest.raises(PolicyError, match="commits the mask or a token that is not in the vocabulary"):
        decode(denoiser, PROMPTS, 4, Recipe(unmask=Quota(tokens=2), scorer=Overrule(token=LLAMA_MASK)))


def test_a_failed_row_of_an_earlier_policy_stays_failed(denoiser):
    recipe = Recipe(unmask=Quota(tokens=2), constraint=Veto(lost=(1,)), scorer=Overrule())
    assert decode(denoiser, PROMPTS, 4, recipe).failed.tolist() == [False, True, *[False] * 5]


@pytest.mark.parametrize(("arguments", "words"), [
    (([[1]], -1), "gen_length counts tokens; got -1"),
    (([[1]], 0), "nothing to decode; give gen_length, or masks among the prompt"),
    (([], 4), "there is no prompt; give at least one row"),
    (([[1], [2.5]], 4), "prompt 1 is not a sequence of token ids; got torch.float32"),
    (([[40]], 4), "a prompt has token 40; the vocabulary ends at 30"),
    (([[-1]], 4), "a prompt has token -1"),
])  # fmt: skip
def test_bad_input_is_named(arguments, words):
    with pytest.raises(InputError, match=words):
        decode(oracles.copy().denoiser(), *arguments, Recipe(unmask=Quota(tokens=1)))


def test_bad_seeds_conditions_and_bans_are_named():
    denoiser, recipe = oracles.copy(1).denoiser(), Recipe(unmask=Quota(tokens=1))
    with pytest.raises(InputError, match="3 seeds for 2 prompts; give one per row, or a single number"):
        decode(denoiser, [[1], [2]], 1, recipe, seeds=[1, 2, 3])
    with pytest.raises(InputError, match="conditioning 'style' has 1 rows for 2 prompts"):
        decode(denoiser, [[1], [2]], 1, recipe, cond={"style": torch.zeros(1, 3)})
    with pytest.raises(InputError, match="the ban names token 77; the denoiser predicts tokens 0 to 30"):
        decode(denoiser, [[1]], 1, recipe.replace(logits=Ban(banned=(77,))))
    with pytest.raises(InputError, match="the ban leaves no token that could be generated"):
        decode(denoiser, [[1]], 1, recipe.replace(logits=Ban(allowed=(3,), banned=(3,))))
    endless = CallableDenoiser(lambda ids: ids, DenoiserSpec(mask_id=MASK, vocab_size=31))
    with pytest.raises(InputError, match="the eos exit needs an end-of-sequence token; give eos_ids"):
        decode(endless, [[1]], 1, recipe.replace(exit={"type": "eos"}))
    with pytest.raises(InputError, match="full attention and no blocks of its own; give the fixed schedule a length"):
        decode(denoiser, [[1]], 1, recipe.replace(blocks=Fixed(length=None)))
    assert SPEC.eos_ids == (EOS,)
