"""Searches for recipes: what varies, limits with errors, halving, journals, and halves of the questions."""

import json
import math
import random

import pytest
from tokens import oracles

from fewstep.eval.tokens import Answer
from fewstep.samplers import InputError
from fewstep.samplers.files import read_json
from fewstep.samplers.tokens import RECIPES, Fixed, Quota, Recipe, Threshold, decode
from fewstep.search.tokens import (
    REFERENCE,
    Candidates,
    Journal,
    RecipeCandidate,
    Tally,
    TokenLimit,
    TokenObjective,
    Variation,
    search_recipe,
    vary,
)

SHUFFLE = oracles.shuffle(4)
COPY = oracles.copy(4)


def answer(seed, task, right, nfe, token_forwards):
    return Answer(
        seed=seed, task=task, text="", right=right, nfe=nfe, token_forwards=token_forwards, new_tokens=1,
        exact=True, failed=False, reveal=(), kv_bytes=0,
    )  # fmt: skip


def ask_oracles(recipe, seeds):
    """Even seeds ask for a copy, odd ones for a permutation, each drawn from the oracle's law."""
    found = []
    for parity, task in enumerate((COPY, SHUFFLE)):
        mine = [seed for seed in seeds if seed % 2 == parity]
        prompts = task.prompts(len(mine))
        decoded = decode(task.denoiser(), prompts, task.items, recipe, seeds=mine)
        right = task.right(prompts, decoded.answers)
        found += [
            answer(seed, task.name, bool(right[row]), int(decoded.nfe[row]), int(decoded.token_forwards[row]))
            for row, seed in enumerate(mine)
        ]
    return found


def thresholds(values):
    """Recipes that differ in a threshold."""
    base = Recipe(unmask=Threshold(threshold=0.5), propose=oracles.SAMPLED)
    return vary(base, [Variation(("unmask", "threshold"), tuple(values))])


def limited(*limits, cost="nfe"):
    return TokenObjective(cost, tuple(map(TokenLimit.parse, limits)))


def chosen(found):
    return found.chosen.candidate.changes["unmask.threshold"]


LADDER = {0.2: [4], 0.3: [1, 3], 0.4: [1, 1, 2], 0.6: [1, 1, 1, 1]}
"""How many tokens of a permutation of 4 each threshold takes in its steps: each of m that are left has 1 / m."""


@pytest.mark.parametrize(("limit", "right"), [(0.06, 0.2), (0.15, 0.3), (0.4, 0.4), (0.9, 0.6)])
def test_the_right_threshold_is_found_on_an_oracle(limit, right):
    found = search_recipe(thresholds(LADDER), limited(f"worst_accuracy>={limit}"), ask_oracles, n=256, seed=1000)
    assert chosen(found) == right
    counts = LADDER[right]
    truth = oracles.shuffle_success_of(counts)
    for tally in (found.chosen.tally, found.fresh):
        worst = tally.estimate("worst_accuracy")
        assert abs(worst.value - truth) <= 3 * worst.se
        assert tally.accuracy.tasks["copy"].value == 1
        assert tally.estimate("nfe").value == (len(counts) + 1) / 2
    assert found.holds
    assert found.fresh.right["copy"][1] == 128


def synthetic(landscape, asked=None):
    """Answers of made-up recipes: by threshold the share of right answers and the cost, on two tasks."""

    def answering(recipe, seeds):
        share, cost = landscape[recipe.unmask.threshold]
        found = []
        for seed in seeds:
            draw = random.Random(f"{recipe.unmask.threshold} {seed}").random()
            noise = random.Random(f"{seed}").random()
            found.append(answer(seed, ("a", "b")[seed % 2], draw < share, cost, round(cost * (10 + noise))))
            if asked is not None:
                asked.append((recipe.unmask.threshold, seed))
        return found

    return answering


def landscape_of(seed):
    """Dearer is mostly better."""
    draw = random.Random(seed)
    return {
        index / 20: (min(1.0, max(0.0, index / 20 + draw.uniform(-0.2, 0.2))), 10 + 5 * index)
        for index in draw.sample(range(1, 20), 12)
    }


def test_halving_agrees_with_the_exhaustive_search_and_asks_less():
    spent, all_of_it = 0, 0
    for seed in range(25):
        landscape, asked = landscape_of(seed), []
        objective = limited("worst_accuracy>=0.6", cost="token_forwards")
        tallies = {each: Tally.of(synthetic(landscape)(Recipe(unmask=Threshold(threshold=each)), range(128)))
                   for each in landscape}  # fmt: skip
        able = [each for each in landscape if tallies[each].estimate("worst_accuracy").value >= 0.6]
        if not able:
            with pytest.raises(InputError, match="none of 12 candidates kept to the limits"):
                search_recipe(thresholds(landscape), objective, synthetic(landscape), n=128, seed=0)
            continue
        best = min(able, key=lambda each: tallies[each].estimate("token_forwards").value)
        found = search_recipe(thresholds(landscape), objective, synthetic(landscape, asked), n=128, seed=0)
        assert chosen(found) == best
        assert found.chosen.tally == tallies[best]
        assert len(set(asked)) == len(asked)
        spent, all_of_it = spent + len(asked) - 128, all_of_it + 128 * len(landscape)
    assert spent < 0.75 * all_of_it


def test_halves_are_disjoint_and_both_are_evidence():
    landscape, asked = {0.5: (0.9, 10), 0.6: (0.95, 20), 0.7: (1.0, 30)}, []
    found = search_recipe(
        thresholds(landscape), limited("worst_accuracy>=0.85*reference"), synthetic(landscape, asked), n=64, seed=40,
        reference=Recipe(name="best", unmask=Threshold(threshold=0.7)), command="fewstep search recipe",
    )  # fmt: skip
    assert chosen(found) == 0.5
    assert {seed for threshold, seed in asked if threshold == 0.6} <= set(range(40, 104))
    assert sorted(seed for threshold, seed in asked if threshold == 0.5) == list(range(40, 168))
    assert (found.seeds, found.fresh_seeds) == ((40, 104), (104, 168))
    evidence = {each.metric: each for each in found.recipe.evidence}
    assert list(evidence) == [
        name + suffix for suffix in ("", " at search") for name in ("nfe", "worst_accuracy", "mean_accuracy")
    ]
    fresh, search = evidence["worst_accuracy"], evidence["worst_accuracy at search"]
    assert (fresh.seeds, search.seeds) == ((104, 168), (40, 104))
    assert (fresh.n, search.n) == (32, 32)
    assert fresh.value - search.value == found.excess("worst_accuracy") != 0
    assert fresh.against == "best, which has 1"
    assert evidence["nfe"].against == "best, which has 30"
    assert evidence["nfe"].command == "fewstep search recipe"
    assert Recipe.from_json(json.loads(json.dumps(found.recipe.to_json()))) == found.recipe


def test_equal_searches_are_equal():
    def once():
        return search_recipe(thresholds(LADDER), limited("worst_accuracy>=0.4"), ask_oracles, n=64, seed=3).to_json()

    assert once() == once()


class Stopped(Exception):
    pass


def test_a_search_that_was_stopped_measures_nothing_twice(tmp_path):
    landscape, objective = landscape_of(1), limited("worst_accuracy>=0.6", cost="nfe*token_forwards")

    def run(path, asked, stop_after=None, **changes):
        measured = synthetic(landscape, asked)

        def answering(recipe, seeds):
            if stop_after is not None and len(asked) >= stop_after:
                raise Stopped
            return measured(recipe, seeds)

        setting = {"n": 64, "seed": 0} | changes
        return search_recipe(
            thresholds(landscape), objective, answering, journal=Journal(path, {"models": "x"}), **setting
        )

    whole, asked = [], []
    expected = run(tmp_path / "whole.json", whole)
    for stop_after in (1, len(whole) // 3, 2 * len(whole) // 3):
        with pytest.raises(Stopped):
            run(tmp_path / "stopped.json", asked, stop_after)
    found = run(tmp_path / "stopped.json", asked)
    assert found == expected
    assert asked == whole
    assert read_json(tmp_path / "stopped.json") == read_json(tmp_path / "whole.json")
    again = []
    assert run(tmp_path / "whole.json", again) == expected
    assert again == []
    rows = read_json(tmp_path / "whole.json")["result"]["trials"]
    assert [row["state"] for row in rows].count("chosen") == 1
    assert len(rows) == 12
    assert run(tmp_path / "whole.json", again, seed=1000).seeds == (1000, 1064)
    assert again


def test_journals_keep_settings_apart_and_refuse_other_files(tmp_path):
    path, recipe = tmp_path / "j.json", Recipe(unmask=Threshold(threshold=0.5))
    first = Journal(path, {"models": "x"}).tally(recipe, range(8), synthetic({0.5: (1.0, 1)}))
    other = Journal(path, {"models": "y"}).tally(recipe, range(8), synthetic({0.5: (0.0, 2)}))
    assert first.estimate("mean_accuracy").value == 1
    assert other.estimate("mean_accuracy").value == 0
    kept = Journal(path, {"models": "x"})
    assert kept.tally(recipe.replace(name="else"), range(8), None) == first
    assert kept.made("filter") is None
    kept.note("filter", "abc")
    assert Journal(path, {"models": "x"}).made("filter") == "abc"
    assert Journal(path, {"models": "y"}).made("filter") is None
    path.write_text('{"fewstep_trials": 2}')
    with pytest.raises(InputError, match=r"is no journal of a search .*; move it away, or name another --out"):
        Journal(path)
    path.write_text('{"measured": ')
    with pytest.raises(InputError, match="is not valid JSON"):
        Journal(path)


def test_candidates_that_do_not_run_are_told_and_left_out():
    def answering(recipe, seeds):
        if recipe.unmask.threshold == 0.5:
            raise InputError("the model cannot")
        return synthetic({0.6: (1.0, 1)})(recipe, seeds)

    found = search_recipe(thresholds([0.5, 0.6]), limited(), answering, n=8, seed=0)
    assert chosen(found) == 0.6
    assert [(each.title, each.reason) for each in found.refused] == [("unmask.threshold=0.5", "the model cannot")]
    with pytest.raises(InputError, match=r"none of 1 candidates ran; unmask.threshold=0\.5: the model cannot"):
        search_recipe(thresholds([0.5]), limited(), answering, n=8, seed=0)


def test_nothing_within_the_limits_names_the_nearest(tmp_path):
    landscape = {0.5: (0.2, 1), 0.6: (0.75, 2), 0.7: (0.4, 3)}
    journal = Journal(tmp_path / "j.json")
    with pytest.raises(
        InputError,
        match=r"none of 3 candidates kept to the limits worst_accuracy>=0.9\*reference; the nearest, "
        r"unmask.threshold=0.6, has worst_accuracy 0.\d+ \+- 0.\d+ where worst_accuracy>=0.9\*reference asks for 0.9 "
        r"\(\d+ questions, nfe 2\); relax the limits, or vary something else",
    ):
        search_recipe(
            thresholds(landscape), limited("worst_accuracy>=0.9*reference"), synthetic(landscape | {0.9: (1.0, 9)}),
            n=128, seed=0, reference=Recipe(unmask=Threshold(threshold=0.9)), journal=journal,
        )  # fmt: skip
    kept = read_json(tmp_path / "j.json")["result"]
    assert kept["chosen"] is None
    assert [row["state"] for row in kept["trials"]] == ["limit"] * 3


def test_a_reference_that_answers_nothing_limits_nothing():
    with pytest.raises(InputError, match=r"the limit mean_accuracy>=0\.9\*reference asks for nothing, the reference's"):
        search_recipe(
            thresholds([0.5]), limited("mean_accuracy>=0.9*reference"), synthetic({0.5: (1.0, 1), 0.9: (0.0, 9)}),
            n=8, seed=0, reference=Recipe(unmask=Threshold(threshold=0.9)),
        )  # fmt: skip


def test_a_limit_drops_only_what_is_beyond_its_error():
    limit = TokenLimit.parse("worst_accuracy>=0.9")
    tally = Tally(right={"a": (8, 10), "b": (10, 10)}, nfe=(40, 80), token_forwards=(400, 8000), product=800)
    slack = limit.slack(tally, None)
    assert slack.value == pytest.approx(-0.1)
    assert slack.se == pytest.approx(math.sqrt(10 / 14 * 4 / 14 / 14))
    assert (slack.holds, slack.could_hold) == (False, True)
    assert (
        not TokenLimit.parse("worst_accuracy>=0.9")
        .slack(tally + Tally(right={"a": (3, 10)}, nfe=(0, 0), token_forwards=(0, 0), product=0), None)
        .could_hold
    )
    relative = TokenLimit.parse("worst_accuracy>=0.9*reference").slack(tally, tally)
    assert relative.holds
    assert relative.se == pytest.approx(slack.se * math.hypot(1, 0.9))


def test_tallies_add_up_to_the_sums_of_all_answers():
    draw = random.Random(0)
    found = [
        answer(seed, draw.choice("abc"), draw.random() < 0.7, draw.randrange(1, 9), draw.randrange(10, 99))
        for seed in range(60)
    ]
    total = Tally.of(found)
    assert Tally.of(found[:13]) + Tally.of(found[13:]) == total
    assert Tally.model_validate_json(total.model_dump_json()) == total
    nfe, forwards = [each.nfe for each in found], [each.token_forwards for each in found]
    for quantity, numbers in (("nfe", nfe), ("token_forwards", forwards)):
        mean = sum(numbers) / 60
        se = math.sqrt(sum((number - mean) ** 2 for number in numbers) / 59 / 60)
        assert (total.estimate(quantity).value, total.estimate(quantity).se) == pytest.approx((mean, se))
    product = total.estimate("nfe*token_forwards")
    assert product.value == pytest.approx(sum(nfe) * sum(forwards) / 3600)
    resampled = [random.Random(seed).choices(found, k=60) for seed in range(300)]
    products = [Tally.of(each).estimate("nfe*token_forwards").value for each in resampled]
    spread = math.sqrt(sum((each - product.value) ** 2 for each in products) / 300)
    assert product.se == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("worst_accuracy<=0.9", "good values of worst_accuracy are >= the limit"),
        ("nfe>=3", "good values of nfe are <= the limit"),
        ("worst_acuracy>=0.9", "unknown quantity 'worst_acuracy'; did you mean 'worst_accuracy'"),
        ("mean_accuracy>=95", "the value of this limit is above 0 and at most 1; got 'mean_accuracy>=95'"),
        ("nfe<=0*reference", "a finite number above 0; got 'nfe<=0\\*reference'"),
        ("nfe<=0.5*teacher", "a multiple of the reference's value, such as nfe<=16 or worst_accuracy>=0.98"),
    ],
)
def test_limits_that_cannot_be(text, words):
    with pytest.raises(InputError, match=words):
        TokenLimit.parse(text)


def test_limits_come_back_as_text():
    for text in ("worst_accuracy>=0.98*reference", "nfe*token_forwards<=0.1*reference", "token_forwards<=512"):
        assert str(TokenLimit.parse(text)) == text
    assert TokenLimit.parse("mean_accuracy >= reference") == TokenLimit("mean_accuracy", ">=", 1.0, True)
    assert TokenObjective().limits == (TokenLimit.parse("worst_accuracy>=0.98*reference"),)
    with pytest.raises(InputError, match="unknown objective 'nfes'; did you mean 'nfe'"):
        TokenObjective("nfes")
    assert REFERENCE.unmask == Quota(tokens=1)


def test_values_are_json_or_text_and_lists_stay_whole():
    parsed = Variation.parse('exit.thresholds=[7.5,5,2.5],[5,3,1],null,dual,{"type":"a,b","x":[1,2]},"p,q"')
    assert parsed.path == ("exit", "thresholds")
    assert parsed.values == ([7.5, 5, 2.5], [5, 3, 1], None, "dual", {"type": "a,b", "x": [1, 2]}, "p,q")
    for text in ("unmask.threshold", "=3", "unmask.threshold=", "unmask..threshold=3"):
        with pytest.raises(InputError, match="what varies is a field of the recipe and its values, such as"):
            Variation.parse(text)


def varied(base, *texts):
    return vary(base, list(map(Variation.parse, texts)))


def test_candidates_are_the_product_without_what_is_refused_or_the_same():
    found = varied(
        RECIPES["fast-dllm-dual"], "unmask.threshold=0.5,0.9,0.90", "cache.type=dual,refresh", "blocks.length=32,0"
    )
    assert len(found.recipes) == 4
    assert found.merged == 2
    assert len(found.refused) == 6
    assert found.refused[0].title == "unmask.threshold=0.5 cache.type=dual blocks.length=0"
    assert "length" in found.refused[0].reason
    assert found.recipes[0].recipe == RECIPES["fast-dllm-dual"].replace(name=None, unmask=Threshold(threshold=0.5))
    assert {each.recipe.name for each in found.recipes} == {None}
    only = varied(RECIPES["fast-dllm"])
    assert only.recipes == (RecipeCandidate(RECIPES["fast-dllm"].replace(name=None), {}),)
    assert only.recipes[0].title == "the recipe as it is"


def test_a_new_type_has_its_own_defaults_whatever_the_order():
    (one,) = varied(RECIPES["fast-dllm"], "unmask.tokens=2", "unmask.type=quota").recipes
    assert one.recipe.unmask == Quota(tokens=2)
    (same,) = varied(RECIPES["fast-dllm"].replace(unmask=Threshold(threshold=0.3)), "unmask.type=threshold").recipes
    assert same.recipe.unmask.threshold == 0.3
    whole, fixed = varied(RECIPES["fast-dllm"], 'blocks={"type":"whole"},{"type":"fixed","length":8}').recipes
    assert (whole.recipe.blocks.type, fixed.recipe.blocks) == ("whole", Fixed(length=8))
    thresholds = varied(RECIPES["prophet"], "exit.thresholds=[7.5,5,2.5],[5,3,1]").recipes
    assert [each.recipe.exit.thresholds for each in thresholds] == [(7.5, 5, 2.5), (5, 3, 1)]
    (scaled,) = varied(RECIPES["amused"], "logits.0.scale=3").recipes
    assert scaled.recipe.logits[0].scale == 3


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["unmask.treshold=0.5"], "none of 1 combinations is a recipe; unmask.treshold=0.5: recipe: .*treshold"),
        (["unmaks.threshold=0.5"], "unknown field of the recipe 'unmaks'; did you mean 'unmask'"),
        (["logits.0.scale=3"], "logits has 0 entries, numbered from 0; got '0'"),
        (["name.x.y=3"], "name is None, which has no 'x' in it"),
        (
            ["unmask.threshold=0.5", "unmask.threshold=0.7"],
            "unmask.threshold is varied twice; give its values together",
        ),
        (["cache.type=dal"], "unknown token cache 'dal'; did you mean 'dual'"),
    ],
)
def test_variations_that_cannot_be(texts, words):
    with pytest.raises(InputError, match=words):
        varied(RECIPES["fast-dllm"], *texts)


def test_progress_reaches_its_end():
    seen = []
    landscape = landscape_of(3)
    search_recipe(
        thresholds(landscape), limited("worst_accuracy>=0.6"), synthetic(landscape), n=32, seed=0,
        progress=lambda done, total, note: seen.append((done, total)),
    )  # fmt: skip
    assert seen == sorted(seen)
    assert all(done <= total for done, total in seen)


def test_one_candidate_and_one_question_are_enough():
    found = Candidates((RecipeCandidate(Recipe(unmask=Threshold(threshold=0.5)), {}),))
    assert search_recipe(found, limited(), synthetic({0.5: (0.0, 1)}), n=1, seed=0).chosen.tally.n == 1
