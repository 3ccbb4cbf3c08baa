"""Recipes as data: presets, round trips, replacements, and the words of the errors."""

import json
from typing import Literal

import pytest
from token_cases import recipes

from fewstep.samplers import Evidence, InputError
from fewstep.samplers.tokens import (
    RECIPES,
    Ban,
    EosExit,
    Fixed,
    Proposal,
    Quota,
    Recipe,
    RefreshAll,
    Threshold,
    TokenCache,
    TokenGuidance,
    Whole,
)
from fewstep.samplers.tokens.slots import SLOTS

PLAIN = Recipe(unmask=Quota(tokens=1))


@pytest.mark.parametrize("recipe", [*recipes().values(), *map(RECIPES.__getitem__, RECIPES.names())])
def test_a_recipe_survives_its_file(recipe, tmp_path):
    evidence = (Evidence(metric="accuracy", value=0.5, n=100),)
    recipe = recipe.replace(evidence=evidence)
    recipe.save(tmp_path / "recipe.json")
    loaded = Recipe.load(tmp_path / "recipe.json")
    assert loaded == recipe
    assert hash(loaded) == hash(recipe)
    assert loaded.policies == recipe.policies
    assert loaded.evidence == evidence


def test_presets_have_the_defaults_of_their_papers():
    assert RECIPES["llada"].unmask == Quota(steps=128)
    assert RECIPES["fast-dllm"].blocks == Fixed(length=32)
    assert RECIPES["fast-dllm"].unmask == Threshold(threshold=0.9)
    likeliest = ("llada", "fast-dllm", "local-leap", "entropy-bound", "prophet", "ass", "eoser", "llada-2.1")
    drawn = ("mdlm", "radd", "first-hitting", "remdm-cap", "remdm-rescale", "remdm-conf", "remdm-loop", "amused")
    assert {RECIPES[name].propose.temperature for name in likeliest} == {0.0}
    assert {RECIPES[name].propose.temperature for name in drawn} == {1.0}
    assert RECIPES["dimple"].propose == Proposal(temperature=0.2, top_p=0.95)
    with pytest.raises(InputError, match="unknown recipe 'lada'; did you mean 'llada'"):
        RECIPES["lada"]


def test_what_is_left_out_is_not_in_the_file():
    assert PLAIN.to_json() == {"unmask": Quota(tokens=1).model_dump(), "fewstep_recipe": 1}
    assert (PLAIN.blocks, PLAIN.logits, PLAIN.branches) == (Whole(), (), ())
    assert PLAIN.replace(logits=TokenGuidance(scale=2)).branches == ("uncond",)


def test_the_schema_lists_every_policy():
    text = json.dumps(Recipe.model_json_schema())
    for registry, _ in SLOTS.values():
        assert all(f'"const": "{name}"' in text for name in registry.names())


def test_policies_may_be_given_as_data_and_in_lists():
    recipe = Recipe(
        unmask={"type": "threshold"}, logits=[{"type": "ban", "banned": [3]}], exit={"type": "eos", "drop": True}
    )
    assert (recipe.unmask, recipe.logits, recipe.exit) == (Threshold(), (Ban(banned=(3,)),), EosExit(drop=True))


@pytest.mark.parametrize(("fields", "words"), [
    ({"unmask": {"type": "treshold"}}, "unknown unmask policy 'treshold'; did you mean 'threshold'?"),
    ({"unmask": {"type": "quota"}}, "exactly one of steps, steps_per_block and tokens"),
    ({"unmask": {"type": "quota", "steps": 3, "tokens": 2}}, "exactly one of steps, steps_per_block and tokens"),
    ({"unmask": {"type": "threshold", "threshold": 1.5}}, "less than or equal to 1; got 1.5"),
    ({"cache": None}, "cache holds a token cache; got None"),
    ({"cache": Threshold()}, "cache holds a token cache; got Threshold"),
    ({"logits": [RefreshAll()]}, "logits holds a logits processor; got RefreshAll"),
    ({"logits": [{"type": "ban"}]}, "a ban names allowed or banned tokens"),
    ({"logits": "ban"}, "a list of logits processors is expected; got 'ban'"),
    ({"logits": [Ban(banned=(3,))] * 2}, "ban logits processor is there twice with the same settings; keep one"),
    ({"propose": {"temperature": -1}}, "propose.temperature: .*; got -1"),
    ({"chaches": 3}, "chaches: Extra inputs are not permitted; got 3"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(fields, words):
    with pytest.raises(InputError, match=words) as error:
        Recipe(**({"unmask": Quota(tokens=1)} | fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("data", "words"), [
    ({"unmask": {}}, 'r is not a fewstep recipe; a recipe is a JSON object with "fewstep_recipe": 1'),
    ({"fewstep_plan": 1}, "r is not a fewstep recipe"),
    ({"fewstep_recipe": 2}, "r has recipe version 2; this fewstep reads version 1"),
    ({"fewstep_recipe": 1, "unmsk": 3}, "r: unknown slot 'unmsk'; did you mean 'unmask'?"),
    ({"fewstep_recipe": 1}, "r: unmask: Field required"),
])  # fmt: skip
def test_files_that_are_no_recipes_are_refused(data, words):
    with pytest.raises(InputError, match=words):
        Recipe.from_json(data, "r")


class Picky(TokenCache):
    """Works with whole canvases only."""

    type: Literal["test-picky"] = "test-picky"

    def check(self, recipe):
        if recipe.blocks.type != "whole":
            raise InputError("the test-picky cache needs the whole canvas; use the whole block schedule")

    def plan(self, state):
        raise NotImplementedError

    def exactness(self, spec):
        return False


def test_policies_that_cannot_work_together_are_refused_when_the_recipe_is_made():
    assert PLAIN.replace(cache=Picky()).cache == Picky()
    with pytest.raises(InputError, match="the test-picky cache needs the whole canvas; use the whole block schedule"):
        PLAIN.replace(cache=Picky(), blocks=Fixed())
