"""Decoding with denoisers that know the truth, against closed forms."""

import math

import oracles
import pytest
import torch
from oracles import CERTAIN, EOS, MASK, SAMPLED, replace_random_success, shuffle_success, success

from fewstep.samplers.tokens import EosExit, Fixed, Quota, Recipe, Threshold, decode


def random_quota(tokens):
    return Recipe(unmask=Quota(tokens=tokens, confidence="random"), propose=SAMPLED)


def test_the_oracles_enumerate_what_they_say():
    assert len(oracles.latin_squares(4)) == 576
    assert oracles.shuffle(5).support(torch.arange(1, 6)[None]).unique(dim=1).shape == (1, 120, 5)
    ids = torch.tensor([[1, 2, 3, 2, MASK, MASK]])
    probs = oracles.shuffle(3).marginals(ids).exp()[0, 4:]
    torch.testing.assert_close(probs[:, 1:4], torch.tensor([[0.5, 0.0, 0.5]] * 2, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [1, 2, 4, 6])
@pytest.mark.parametrize(("task", "closed"), [
    (oracles.shuffle(), shuffle_success), (oracles.replace_random(), replace_random_success)
], ids=["shuffle", "replace-random"])  # fmt: skip
def test_a_quota_succeeds_as_often_as_the_closed_form(task, closed, tokens):
    """Drawn at temperature 1, k random positions a step: within three standard errors."""
    rows, chance = 1000, closed(task.items, tokens)
    measured, decoded = success(task, random_quota(tokens), rows)
    assert abs(measured - chance) <= 3 * math.sqrt(max(chance * (1 - chance), 1e-12) / rows)
    assert decoded.nfe.tolist() == [math.ceil(task.items / tokens)] * rows


def test_closed_forms_at_their_ends():
    assert shuffle_success(6, 6) == pytest.approx(math.factorial(6) / 6**6)
    assert replace_random_success(6, 6) == pytest.approx((1 - 1 / 6) ** 5)
    assert shuffle_success(6, 1) == replace_random_success(6, 1) == pytest.approx(1)


def test_latin_squares_need_one_token_at_a_time():
    task = oracles.latin()
    assert success(task, random_quota(1), 60)[0] == 1
    assert success(task, random_quota(16), 60)[0] == 0
    assert 0.05 < success(task, random_quota(4), 200)[0] < 0.4


def test_a_latin_square_with_givens_is_completed_around_them():
    task = oracles.latin()
    square = oracles.latin_squares(4)[123]
    given = torch.where(torch.arange(16) % 3 == 0, square, MASK)
    decoded = decode(task.denoiser(), given.expand(20, -1), 0, random_quota(1))
    assert task.right(given[:0].expand(20, 0), decoded.tokens).all()
    assert torch.equal(decoded.tokens[:, ::3], square[::3].expand(20, -1))


@pytest.mark.parametrize("make", CERTAIN)
@pytest.mark.parametrize(
    "recipe", [Recipe(unmask=Threshold()), Recipe(unmask=Quota(tokens=6))], ids=["adaptive", "quota"]
)
def test_what_is_certain_takes_one_forward_pass(make, recipe):
    task = make()
    rate, decoded = success(task, recipe, 3)
    assert rate == 1
    assert decoded.nfe.tolist() == decoded.steps.tolist() == [1] * 3
    assert decoded.tokens_per_forward.tolist() == [6.0] * 3


def test_a_threshold_refuses_to_parallelise_what_depends():
    """Of m items left each is as likely as 1/m: nothing reaches 0.9 until the last."""
    rate, decoded = success(oracles.shuffle(), Recipe(unmask=Threshold(threshold=0.9), propose=SAMPLED), 20)
    assert rate == 1
    assert decoded.nfe.tolist() == [6] * 20
    loose = success(oracles.shuffle(), Recipe(unmask=Threshold(threshold=0.5), propose=SAMPLED), 20)[1]
    assert loose.nfe.tolist() == [5] * 20


def test_a_loose_threshold_fails_on_a_word_that_no_position_prefers():
    """Each position keeps its item with probability 5/6, so greedy decoding below that never places the word."""
    assert success(oracles.replace_random(), Recipe(unmask=Threshold(threshold=0.8)), 2)[0] == 0
    assert success(oracles.replace_random(), Recipe(unmask=Threshold(threshold=0.9)), 2)[0] == 1


def test_blocks_are_filled_from_left_to_right():
    recipe = Recipe(blocks=Fixed(length=2), unmask=Quota(tokens=1, confidence="random"), propose=SAMPLED)
    _, decoded = success(oracles.shuffle(), recipe, 20)
    order = decoded.reveal_step[:, 6:]
    assert torch.equal(order.div(2, rounding_mode="floor"), torch.tensor([0, 0, 1, 1, 2, 2]).expand(20, -1))
    assert {tuple(row) for row in order.tolist()} != {(0, 1, 2, 3, 4, 5)}


@pytest.mark.parametrize(("drop", "per_row"), [(False, 7 * 22), (True, 22 + 6 * 13)])
def test_an_answer_ends_at_its_end(drop, per_row):
    """Ten ends are certain in the first step, six items take one each; dropped ends are not evaluated again."""
    task = oracles.shuffle()
    recipe = Recipe(unmask=Threshold(threshold=0.9), propose=SAMPLED)
    prompts = task.prompts(4)
    full = decode(task.denoiser(), prompts, 16, recipe)
    early = decode(task.denoiser(), prompts, 16, recipe.replace(exit=EosExit(drop=drop)))
    assert torch.equal(full.tokens, early.tokens)
    assert early.ends.tolist() == [13] * 4
    assert early.new_tokens.tolist() == full.new_tokens.tolist() == [7] * 4
    assert early.nfe.tolist() == [7] * 4
    assert (early.answers[:, 6:] == EOS).all()
    assert early.token_forwards.tolist() == [per_row] * 4


def test_a_row_that_ended_costs_nothing_more():
    """Blocks of four over an answer of six and ten ends: two blocks are decoded, four without the exit."""
    task = oracles.copy()
    recipe = Recipe(blocks=Fixed(length=4), unmask=Threshold())
    costs = [
        decode(task.denoiser(), task.prompts(2), 16, recipe.replace(exit=early)).nfe.tolist()
        for early in (EosExit(), EosExit(drop=True), {"type": "none"})
    ]
    assert costs == [[2, 2], [2, 2], [4, 4]]
