"""Learn2PD's filter: what it is trained on, the file that is kept, and the threshold that is chosen."""

from types import SimpleNamespace

import pytest
import torch
from tokens import oracles

from fewstep.eval.tokens import Question, TokenModels, answers
from fewstep.samplers import InputError
from fewstep.samplers.tokens import RECIPES, DualCache, Fixed, Learned, Quota, Threshold
from fewstep.search.tokens import (
    FilterTraining,
    Journal,
    TokenLimit,
    TokenObjective,
    filter_base,
    filter_candidates,
    filter_data,
    fitted_filter,
    search_recipe,
    token_filter,
)

ITEMS = 4
ORACLE = oracles.replace_random(ITEMS)
TRAINING = FilterTraining(length=ITEMS, gen_length=ITEMS, steps=1500)


class Numbers:
    """A tokenizer of numbers with blanks between them."""

    def __call__(self, text, add_special_tokens):
        return SimpleNamespace(input_ids=list(map(int, text.split())))

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def question(seed):
    """Items in an order of its own, one of which, any, has to give way to the word."""
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))[:ITEMS] + 1
    items = order.tolist()
    right = {" ".join(map(str, [*items[:at], oracles.WORD, *items[at + 1 :]])) for at in range(ITEMS)}
    return Question("replace-random", " ".join(map(str, [*items, oracles.WORD])), seed, right.__contains__)


@pytest.fixture
def models():
    return TokenModels("oracle", Numbers(), {"oracle": ORACLE.denoiser()}, None)


def ask(models):
    return lambda recipe, seeds: answers(models, list(map(question, seeds)), recipe, ITEMS)


def test_a_filter_learns_what_one_token_a_step_does_and_its_threshold_is_found(models, tmp_path):
    """Each item is right with 3/4, so that a threshold takes all, and is wrong, or one at a time. One token a step
    keeps the first three items and then has to put the word last; the filter learns to take these three at once."""
    objective = TokenObjective("nfe", (TokenLimit.parse("worst_accuracy>=0.9"),))
    base, file = filter_base(ITEMS), tmp_path / "x.filter.safetensors"
    journal = Journal(tmp_path / "x.trials.json")
    fitted_filter(models, list(map(question, range(16))), base, TRAINING, file, journal, batch_size=5)
    candidates = filter_candidates(base, file, ITEMS, (0.0, 0.5, 1.0, 0.5))
    found = search_recipe(candidates, objective, ask(models), n=32, seed=100, journal=journal)
    costs = {trial.candidate.changes["unmask.threshold"]: trial.tally.estimate("nfe").value for trial in found.trials}
    assert costs == {0.0: 1, 0.5: 2, 1.0: 4}
    assert found.recipe.unmask == Learned(file=file.name, length=ITEMS, threshold=0.5)
    assert found.fresh.estimate("worst_accuracy").value == 1
    assert found.trials[0].state == "limit"
    plain = ask(models)(base.replace(unmask=Threshold(threshold=0.7)), range(8))
    assert not any(answer.right for answer in plain)
    found.recipe.save(tmp_path / "x.json")
    again = ask(models)(type(found.recipe).load(tmp_path / "x.json"), range(8))
    assert all(answer.right and answer.nfe == 2 for answer in again)


def test_data_are_those_of_all_questions_whatever_the_batch(models):
    asked = list(map(question, range(7)))
    counts = []
    one, other = (
        filter_data(models, asked, filter_base(ITEMS), TRAINING, batch_size=size, progress=counts.append)
        for size in (3, 7)
    )
    assert counts == [3, 3, 1, 7]
    # three items are right at once, then the word; the reference puts it where it has to
    assert len(one.features) == len(other.features) == 14
    for name in ("features", "final", "counted"):
        mine, theirs = (getattr(data, name).double().sum(0) for data in (one, other))
        torch.testing.assert_close(mine, theirs)
    assert one.final.sum(0).tolist() == [7, 7, 7, 7]
    assert one.counted.sum(0).tolist() == [7, 7, 7, 14]


def test_a_filter_is_trained_again_only_where_it_has_to_be(models, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(
        token_filter, "train_filter", lambda data, **how: trained.append(how) or REAL(data, **(how | {"steps": 2}))
    )
    file, asked, base = tmp_path / "f.safetensors", list(map(question, range(3))), filter_base(ITEMS)

    def fit(training=TRAINING, asked=asked, setting="a"):
        fitted_filter(models, asked, base, training, file, Journal(tmp_path / "j.json", setting))

    fit()
    kept = file.read_bytes()
    fit()
    assert trained == [{"steps": 1500, "lr": 3e-3, "seed": 0}]
    file.write_bytes(b"something else")
    fit()
    assert len(trained) == 2
    assert file.read_bytes() == kept
    file.unlink()
    fit()
    fit(FilterTraining(length=ITEMS, gen_length=ITEMS, steps=1500, seed=1))
    fit(asked=asked[:2])
    fit(setting="b")
    assert len(trained) == 6


REAL = token_filter.train_filter


def test_the_rest_of_the_recipe_stays(tmp_path):
    candidates = filter_candidates(RECIPES["fast-dllm-dual"], tmp_path / "f.safetensors", 32, (0.5, 0.9))
    assert [each.title for each in candidates.recipes] == ["unmask.threshold=0.5", "unmask.threshold=0.9"]
    recipe = candidates.recipes[1].recipe
    assert (recipe.blocks, recipe.cache, recipe.name) == (Fixed(length=32), DualCache(), None)
    assert recipe.folder == tmp_path
    assert recipe.file_names == ("f.safetensors",)
    with pytest.raises(InputError, match="a filter for blocks of 16, and the recipe has blocks of 32"):
        filter_candidates(RECIPES["fast-dllm-dual"], tmp_path / "f.safetensors", 16, (0.5,))
    with pytest.raises(InputError, match="a threshold is a probability, 0 to 1; got 2"):
        filter_candidates(filter_base(32), tmp_path / "f.safetensors", 32, (0.5, 2))
    assert filter_base(8).unmask == Quota(tokens=1)
    for wrong, words in (
        ({"length": 0}, "length must be at least 1; got 0"),
        ({"lr": 3.0}, "lr must be between 0 and"),
    ):
        with pytest.raises(InputError, match=words):
            FilterTraining(**wrong)
