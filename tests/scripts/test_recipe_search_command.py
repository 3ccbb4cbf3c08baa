"""``fewstep search recipe`` and ``token-filter`` on tiny models."""

import json

import pytest
import torch

from fewstep.eval.tokens import models
from fewstep.samplers.files import read_json
from fewstep.samplers.tokens import Recipe, Threshold, TokenFilter, decode, load_denoiser
from fewstep.scripts import recipe_search_command
from fewstep.scripts.cli import main
from fewstep.scripts.demo import train_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "tokens"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind in ("masked", "ar"):
            train_tokens.save_model(kind, folder / kind, train_tokens.new_model(width=32, layers=1))
    return folder


@pytest.fixture
def command(folder, tmp_path, monkeypatch):
    """Runs an action with few questions on models in the place of the demo's; the exit status."""
    monkeypatch.setattr(models, "DEMO", folder.parent)

    def run(action, *arguments, out="found.json"):
        few = ["--n", "8", "--gen_length", "8", "--limits", "nfe<=100"]
        where = ["--out", str(tmp_path / "deep" / out)]
        return main(["search", action, *where, *few, *arguments])

    return run


@pytest.fixture
def found(tmp_path):
    return tmp_path / "deep" / "found.json"


VARY = ("--vary", "unmask.threshold=0.0,0.9", "--vary", "cache.type=dual,none", "blocks.length=8,0")


def test_recipe(command, found, capsys, monkeypatch):
    """Flags that are repeated add up; the same command measures nothing again."""
    assert command("recipe", *VARY) == 0
    shown = capsys.readouterr().out
    assert "refused: unmask.threshold=0.0 cache.type=dual blocks.length=0 and 3 more: recipe: blocks.length" in shown
    assert "on fresh questions: token_forwards" in shown
    assert "excess: token_forwards" in shown
    assert shown.rstrip().endswith("found.json")
    recipe = Recipe.load(found)
    assert recipe.name == "found"
    assert recipe.unmask == Threshold(threshold=0.0)
    assert recipe.blocks.length == 8
    assert {each.metric for each in recipe.evidence} >= {"token_forwards", "token_forwards at search", "nfe"}
    assert "fewstep search recipe" in recipe.evidence[0].command
    table = read_json(found.with_suffix(".trials.json"))["result"]
    assert len(table["trials"]) == 4
    assert len(table["refused"]) == 4
    kept = found.read_bytes()
    monkeypatch.setattr(recipe_search_command, "answers", None)
    assert command("recipe", *VARY) == 0
    assert found.read_bytes() == kept
    with pytest.raises(TypeError):
        command("recipe", *VARY, "--gen_length", "9")


def test_recipes_that_name_files_take_them_along(command, found, tmp_path):
    TokenFilter(8).save(tmp_path / "f.safetensors")
    base = {"fewstep_recipe": 1, "blocks": {"type": "fixed", "length": 8}}
    base["unmask"] = {"type": "learned", "file": "f.safetensors", "length": 8}
    (tmp_path / "base.json").write_text(json.dumps(base))
    assert command("recipe", "--recipe", str(tmp_path / "base.json"), "--vary", "unmask.threshold=0.2") == 0
    assert Recipe.load(found).unmask.threshold == 0.2
    assert (found.parent / "f.safetensors").read_bytes() == (tmp_path / "f.safetensors").read_bytes()


def test_token_filter(command, found, folder, tmp_path):
    questions = tmp_path / "q.jsonl"
    lines = [{"task": "t", "prompt": f"copy {word}\n", "answers": [word]} for word in "abcdefghijklmnopqrstuvwx"]
    questions.write_text("\n".join(map(json.dumps, lines)))
    assert command("token-filter", "--length", "4", "--steps", "5", "--questions", str(questions)) == 0
    recipe = Recipe.load(found)
    assert recipe.unmask.file == "found.filter.safetensors"
    assert recipe.unmask.length == recipe.blocks.length == TokenFilter.load(found.parent / recipe.unmask.file).length
    assert recipe.evidence[0].seeds == (1_000_016, 1_000_024)
    assert decode(load_denoiser(folder / "masked"), [[5, 6]], 8, recipe).nfe.item() <= 8
    assert command("token-filter", "--length", "32", "--steps", "5", "--recipe", "fast-dllm-dual") == 0
    assert Recipe.load(found).cache.type == "dual"


@pytest.mark.parametrize(
    ("action", "arguments", "words"),
    [
        ("recipe", ["--recipe", "fast-dlm"], "unknown recipe 'fast-dlm'; did you mean 'fast-dllm'?"),
        ("recipe", ["--recipe", "nowhere.json"], "nowhere.json does not exist"),
        ("recipe", ["--vary", "unmask.threshold"], "what varies is a field of the recipe and its values"),
        ("recipe", ["--limits", "accuracy>=0.9"], "unknown quantity 'accuracy'; did you mean"),
        ("recipe", ["--objective", "latency"], "unknown objective 'latency'"),
        ("recipe", ["--reference", "lada"], "unknown recipe 'lada'; did you mean 'llada'?"),
        ("recipe", ["--limits", "nfe<=0.5"], "none of 1 candidates kept to the limits nfe<=100, nfe<=0.5; the nearest"),
        ("recipe", ["--pipe", "nowhere"], "--pipe nowhere has no questions of its own; give --questions FILE"),
        ("recipe", ["--gen_length", "0"], "--gen_length must be at least 1; got 0"),
        ("recipe", ["--out", "found.txt"], "--out found.txt is not a recipe file; give a name that ends in .json"),
        ("token-filter", ["--thresholds", "1.5"], "a threshold is a probability, 0 to 1; got 1.5"),
        ("token-filter", ["--recipe", "fast-dllm", "--length", "8"], "a filter for blocks of 8, and the recipe has"),
    ],
)
def test_searches_that_cannot_be(command, found, capsys, action, arguments, words):
    assert command(action, *arguments) == 2
    assert words in capsys.readouterr().err
    assert not found.exists()


def test_files_with_too_few_questions_are_refused(command, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps({"task": "t", "prompt": f"{n}", "answers": ["a"]}) for n in range(15)))
    assert command("recipe", "--questions", str(path)) == 2
    assert "--n 8 asks 16 different questions, and" in (words := capsys.readouterr().err)
    assert "holds 15; give --n 7, or more questions" in words
    assert command("token-filter", "--questions", str(path)) == 2
    assert "holds 15; give --n 5, or more questions" in capsys.readouterr().err
