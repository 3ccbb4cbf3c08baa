"""Votes over decodings."""

import oracles
import pytest
import torch
from oracles import EOS

from fewstep.samplers import InputError
from fewstep.samplers.tokens import CallableDenoiser, DenoiserSpec, Fixed, Proposal, Quota, Recipe, decode, vote

SAMPLED = Proposal(temperature=1.0)
LAW = torch.tensor([0.05, 0.5, 0.25, 0.2], dtype=torch.float64)
COIN = CallableDenoiser(
    lambda ids: LAW.log().expand(*ids.shape, 4), DenoiserSpec(mask_id=4, vocab_size=4, eos_ids=(0,))
)
ONE = Recipe(unmask=Quota(tokens=1), propose=SAMPLED)


def as_numbers(answer):
    return tuple(answer.tolist())


def test_a_vote_of_one_is_a_decoding():
    voted = vote(COIN, [[1], [2, 3]], 3, [ONE], as_numbers, seeds=5)
    plain = decode(COIN, [[1], [2, 3]], 3, ONE, seeds=5)
    assert torch.equal(voted.tokens, plain.tokens)
    assert voted.share.tolist() == [1, 1]
    assert voted.nfe.tolist() == plain.nfe.tolist()
    assert len(voted.decoded) == 1


def test_the_majority_wins_and_its_cost_is_told():
    """By hand, from the decodings themselves; every decoding has seeds of its own."""
    recipes = [ONE.replace(blocks=Fixed(length=length)) for length in (1, 2)]
    voted = vote(COIN, [[1], [2], [3]], 2, recipes, as_numbers, repeats=5, seeds=[3, 4, 5])
    assert len(voted.decoded) == len(voted.ballots) == 10
    for row in range(3):
        given = [ballots[row] for ballots in voted.ballots]
        assert len(set(given)) > 1
        most = max(map(given.count, given))
        winner = next(answer for answer in given if given.count(answer) == most)
        assert voted.answers[row] == winner
        assert voted.share[row] == most / 10
        assert voted.winner[row] == given.index(winner)
        assert torch.equal(voted.tokens[row], voted.decoded[voted.winner[row]].tokens[row])
    assert voted.nfe.tolist() == [20] * 3
    assert torch.equal(voted.token_forwards, sum(each.token_forwards for each in voted.decoded))
    alone = vote(COIN, [[2]], 2, recipes, as_numbers, repeats=5, seeds=[4])
    assert alone.ballots == tuple((ballots[1],) for ballots in voted.ballots)


def test_votes_find_the_likely_answer_more_often_than_one_decoding_does():
    """A token of probability 1/2 among 1/4 and 1/5: binomial, P(most of 15) is above 0.8."""
    voted = vote(COIN, [[]] * 150, 1, [ONE], as_numbers, repeats=15)
    right = sum(answer == (1,) for answer in voted.answers) / 150
    assert right > 0.8
    single = sum(ballot == (1,) for ballot in voted.ballots[0]) / 150
    assert abs(single - 0.5) < 0.13


def test_what_cannot_be_read_has_no_vote():
    """An answer is read up to its end; of those left any may win, and none at all is said."""
    seen = []

    def odd(answer):
        seen.append(answer)
        return int(answer[0]) if len(answer) and answer[0] % 2 else None

    voted = vote(COIN, [[]] * 20, 2, [ONE], odd, repeats=4)
    assert all((answer != EOS).all() for answer in seen)
    assert min(map(len, seen)) < 2
    for row, answer in enumerate(voted.answers):
        given = [ballots[row] for ballots in voted.ballots]
        assert answer is None if not any(given) else answer in given
        assert voted.share[row] == given.count(answer) / 4 if answer else voted.share[row] == 0
    assert voted.tokens.shape == (20, 2)


def test_tasks_with_one_answer_are_voted_for_unanimously():
    task = oracles.reverse()
    voted = vote(task.denoiser(), task.prompts(2), 6, ["llada", Recipe(unmask=Quota(tokens=3))], as_numbers)
    assert voted.share.tolist() == [1, 1]
    assert task.right(task.prompts(2), voted.tokens[:, -6:]).all()


def test_a_vote_needs_decodings():
    with pytest.raises(InputError, match="a vote needs decodings; got 0 recipes and 1 repeats"):
        vote(COIN, [[1]], 2, [], as_numbers)
    with pytest.raises(InputError, match="got 1 recipes and 0 repeats"):
        vote(COIN, [[1]], 2, [ONE], as_numbers, repeats=0)
