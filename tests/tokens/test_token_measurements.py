"""Agreement along trajectories, accuracy of caches, and docs/tokens.md, which says what was measured."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from token_models import BLOCK_CAUSAL, MASK, PROMPTS, llama_denoiser, recorded

from fewstep.samplers import InputError
from fewstep.samplers.tokens import CACHES, UNMASKS, DkvGreedy, DualCache, Fixed, Order, Quota, Recipe, decode
from fewstep.scripts import tokens_doc, tokens_picture
from fewstep.scripts.bench import slim_runs, token_caches
from fewstep.scripts.bench.token_cases import NO_CACHE, accuracy_cases, agreement_cases
from fewstep.scripts.demo import train_tokens

ROOT = Path(__file__).parents[2]
FULL, BLOCKED = llama_denoiser(), llama_denoiser(**BLOCK_CAUSAL)
PROMPT_IDS = [list(prompt) for prompt in PROMPTS]


def followed(denoiser, recipe, length=8):
    along = token_caches.uncached(denoiser, PROMPT_IDS, recipe, length, seed=5)
    return along, *token_caches.compared(denoiser, along, recipe, seed=5)


def exact_cases(denoiser):
    return [
        pytest.param(denoiser, case, policy, id=f"{denoiser.spec.attention} {case.name} {policy}")
        for case in agreement_cases(denoiser.spec)
        for policy in case.policies
        if case.cache.exactness(denoiser.spec)
    ]


@pytest.mark.parametrize(("denoiser", "case", "policy"), [*exact_cases(FULL), *exact_cases(BLOCKED)])
def test_exact_caches_and_those_that_refresh_in_every_step_agree_fully(denoiser, case, policy):
    recipe = case.recipe(policy)
    along, sums, lazy = followed(denoiser, recipe)
    assert lazy.exact
    positions, same, divergence, committed, committed_same = sums.sum(0).unbind(1)
    assert torch.equal(positions, same)
    assert torch.equal(committed, committed_same)
    assert divergence.abs().max() < 1e-6
    assert committed[1] == 8 * len(PROMPTS)
    assert (lazy.token_forwards <= along.decoded.token_forwards).all()


def test_no_cache_agrees_with_itself():
    _, sums, lazy = followed(FULL, Recipe(blocks=Fixed(length=4), unmask=Quota(tokens=1)))
    assert lazy.exact
    assert torch.equal(sums[..., 0], sums[..., 1])
    assert (sums[..., 2] == 0).all()


@pytest.mark.parametrize("cache", [DualCache(), DkvGreedy(refresh=4, window=0)], ids=["dual", "dkv-greedy"])
def test_sums_are_those_of_a_loop_over_positions(cache):
    """From recorded logits, position by position; dkv-greedy knows only some positions of a step."""
    recipe = Recipe(blocks=Fixed(length=8), unmask=Order(), cache=cache)
    _, sums, lazy = followed(FULL, recipe)
    plain, steps = recorded(decode, FULL, PROMPT_IDS, 8, recipe.replace(cache=NO_CACHE), seeds=5)
    _, others = recorded(decode, FULL, PROMPT_IDS, 8, recipe, seeds=5, follow=plain)
    expected = torch.zeros_like(sums)
    ends = [next((c for c in range(7, 15) if row[c] == 0), 15) for row in plain.tokens.tolist()]
    for step, ((known, whole, _), (seen, part, _)) in enumerate(zip(steps, others, strict=True)):
        whole, part = (logits.clone().index_fill(1, torch.tensor([MASK]), -torch.inf) for logits in (whole, part))
        at, mine = (
            dict(zip(map(tuple, k.nonzero().tolist()), v, strict=True)) for k, v in ((known, whole), (seen, part))
        )
        for row, column in at.keys() & mine.keys():
            p, q = at[row, column][:MASK].softmax(0).double(), mine[row, column][:MASK].softmax(0).double()
            same, now = p.argmax() == q.argmax(), plain.reveal_step[row, column] == step
            values = [1, same, (p * (p / q).log()).sum(), now, now & same]
            for area in range(2):
                if area or column <= ends[row]:
                    expected[row, area] += torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(sums, expected, atol=1e-5, rtol=1e-5)
    assert not lazy.exact
    assert sums[:, 1, 1].sum() < sums[:, 1, 0].sum(), "random weights see through a cache that is never renewed"
    if cache.type == "dkv-greedy":
        assert sums[:, 1, 0].sum() < 7 * 8 * 9 / 2


def test_a_decoding_that_is_called_exact_and_is_not_stops_the_measurement():
    recipe = Recipe(blocks=Fixed(length=8), unmask=Quota(tokens=1))
    along = token_caches.uncached(FULL, PROMPT_IDS, recipe, 8, seed=5)
    along.steps[:] = [(known, log_probs.flip(1)) for known, log_probs in along.steps]
    with pytest.raises(RuntimeError, match="the none cache calls itself exact and differs at"):
        token_caches.compared(FULL, along, recipe, seed=5)


def test_shares_and_their_errors():
    part, whole = torch.tensor([2.0, 1.0, 3.0]), torch.tensor([2.0, 2.0, 4.0])
    ratio, spread = 0.75, 0.5**2 + 0.5**2 + 0.0
    expected = [ratio, round(math.sqrt(spread * 3 / 2) / 8, 5)]
    assert token_caches.share(part, whole) == expected
    assert token_caches.share(part, 0 * whole) is None
    assert token_caches.share(part[:1], whole[:1]) == [1.0, 0.0]


def test_accuracies_are_means_over_tasks_and_differences_are_paired():
    tasks = ["copy", "shuffle"] * 4
    right = [True, False, True, True, True, False, False, False]
    plain = [True, True, True, True, True, True, False, True]
    found = token_caches.accuracy(right, tasks, plain)
    assert (found["tasks"]["copy"][0], found["tasks"]["shuffle"][0]) == (0.75, 0.25)
    assert (found["worst"], found["mean"][0]) == ("shuffle", 0.5)
    assert (found["certain"][0], found["dependent"][0]) == (0.75, 0.25)
    assert found["less_uncached"]["certain"] == [0.0, 0.0]
    assert found["less_uncached"]["dependent"] == [-0.75, 0.25]
    assert found["less_uncached"]["mean"] == [-0.375, 0.125]


def test_every_cache_is_measured():
    cases = [
        case
        for denoiser in (FULL, BLOCKED)
        for each in (agreement_cases, accuracy_cases)
        for case in each(denoiser.spec)
    ]
    assert {case.cache.type for case in cases} == set(CACHES.names())
    for denoiser in (FULL, BLOCKED):
        for each in (agreement_cases, accuracy_cases):
            recipes = [str(c.recipe(p).to_json()) for c in each(denoiser.spec) for p in c.policies]
            assert len(set(recipes)) == len(recipes)
            for case in each(denoiser.spec):
                case.recipe(case.policies[0]).suits(denoiser)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """What the script writes for two tiny models, and how often it decodes when it is asked again."""
    for kind in ("masked", "block"):
        train_tokens.save_model(kind, tmp_path / "models" / kind, train_tokens.new_model(width=32, layers=1))
    few = {"agreement_cases": (0, 5), "accuracy_cases": (0, 2)}
    for name, kept in few.items():
        made = getattr(token_caches, name)
        monkeypatch.setattr(
            token_caches, name, lambda spec, made=made, kept=kept: [made(spec)[i] for i in kept if i < len(made(spec))]
        )
    out = tmp_path / "results" / "tokens-caches.json"
    words = ["token_caches", "--pipe", str(tmp_path / "models"), "--work", str(tmp_path / "work"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*words, "--n", "8", "--answers", "8", "--gen_length", "6"])
    token_caches.main()
    return out


def test_the_script_goes_on_where_it_stopped_and_the_document_says_what_it_wrote(measured, monkeypatch, capsys):
    first = measured.read_text()
    monkeypatch.setattr(token_caches, "decode", None)
    monkeypatch.setattr(token_caches, "answers", None)
    token_caches.main()
    assert measured.read_text() == first
    found = json.loads(first)
    assert {row["policy"] for row in found["agreement"]} == {"one", "threshold"}
    assert all(row["answer"]["total"]["same"][0] == 1 for row in found["agreement"] if row["exact"])
    text = tokens_doc.document(measured.parent, measured.parent / "none")
    for words in (
        "8 questions, 6 masks",
        "**`block` (block-causal attention, 8 to a block)",
        "| prefix |",
        "less no cache",
    ):
        assert words in text
    assert f"--pipe {found['pipe']} --n 8 --answers 8 --gen_length 6 --out docs/results/tokens-caches.json" in text
    tokens_picture.renew(measured, measured.parent)
    assert (measured.parent / tokens_picture.PICTURE).read_bytes().startswith(b"\x89PNG")


def run(name, role, nfe, **rest):
    costs = {"network": "masked", "exact": True, "gen_length": 64, "token_forwards": 1234.5, "tokens_per_forward": 2.5}
    costs |= {
        "tokens_per_s": 99.6,
        "batch_size": 8,
        "device": "a processor",
        "torch_threads": 1,
        "kv_bytes": 0,
        "failed": 0,
    }
    about = {"config_hash": "", "model_hash": "", "request": "", "n": 80, "seeds": [0, 80], "format": 1}
    metrics = {"worst_accuracy": {"value": 0.5, "se": 0.05}, "accuracy_copy": {"value": 1.0, "se": None}}
    return (
        about
        | {"name": name, "role": role, "nfe": nfe, "control": None, "decoding": costs, "metrics": metrics}
        | {"command": "fewstep bench --pipe demo:tokens"}
        | rest
    )


def test_a_slim_copy_of_a_bench_and_its_table(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    for each in (run("ours", "plan", 4.0, control="static"), run("one", "reference", 64.0)):
        (tmp_path / "runs" / f"{each['name']}.json").write_text(json.dumps(each))
    monkeypatch.setattr(sys, "argv", ["slim_runs", str(tmp_path), str(tmp_path / slim_runs.SLIM)])
    slim_runs.main()
    text = tokens_doc.document(tmp_path, tmp_path / "none")
    assert "### 64 masks\n\n80 questions a row." in text
    assert "| `one` | reference | 0.50 ± 0.05 | 64.0 | 1,234 | 1.00 | 2.50 | yes | 100 |  |\n| `ours` | plan |" in text
    assert "| `ours` | plan | 0.50 ± 0.05 | 4.0 | 1,234 | 1/16 | 2.50 |" in text
    assert "| `ours` | 1.00 |" in text
    assert "fewstep bench --pipe demo:tokens\npython -m fewstep.scripts.bench.slim_runs OUT docs/results" in text
    (tmp_path / "runs" / "image.json").write_text(json.dumps(run("image", "plan", 1.0, decoding=None)))
    with pytest.raises(InputError, match="holds no runs of token models"):
        slim_runs.slim(tmp_path)


def test_recipes_that_were_fitted_are_told_with_their_evidence(tmp_path):
    evidence = {
        "metric": "worst_accuracy",
        "value": 0.9,
        "se": 0.02,
        "n": 64,
        "seeds": (64, 128),
        "command": "fewstep x",
    }
    Recipe(unmask=Quota(tokens=3), cache=DualCache(refresh=2), evidence=[evidence]).save(tmp_path / "found.json")
    text = tokens_doc.document(tmp_path / "none", tmp_path)
    assert "### `found`\n\nblocks `whole`; unmask `quota` (tokens 3); cache `dual` (refresh 2)\n" in text
    assert "| worst_accuracy | 0.900 ± 0.020 | 64 | 64 to 127 |  |" in text
    assert "```bash\nfewstep x\n```" in text


def test_the_document_is_the_generated_one():
    made = tokens_doc.document(ROOT / tokens_doc.RESULTS, ROOT / tokens_doc.FITTED)
    assert made == (ROOT / "docs" / "tokens.md").read_text(encoding="utf-8"), "run python -m fewstep.scripts.tables"
    if tokens_picture.PICTURE in made:
        assert (ROOT / "docs" / tokens_picture.PICTURE).stat().st_size < 200_000


def test_what_was_not_measured_is_left_out(tmp_path):
    text = tokens_doc.document(tmp_path, tmp_path)
    assert "python -m fewstep.scripts.bench" not in text
    assert re.findall(r"^## (.*)", text, flags=re.MULTILINE) == ["Policies", "Presets"]


def test_the_catalogue_says_which_caches_are_exact(tmp_path):
    text = tokens_doc.document(tmp_path, tmp_path)
    lines = {
        line.split("`")[1]: line
        for line in text.split("**`cache`**")[1].split("**`logits`**")[0].split("\n")
        if line.startswith("| `")
    }
    assert set(lines) == set(CACHES.names()) - {"none"}
    assert lines["block-prefix"].endswith("| exact | exact |")
    assert lines["prompt-prefill"].endswith("| approximate | approximate |")
    assert lines["dual"].endswith("| exact with `refresh` 1 | exact with `refresh` 1 |")


def test_the_policy_that_the_guide_adds_runs(monkeypatch):
    monkeypatch.setattr(UNMASKS, "_table", dict(UNMASKS._table))
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL) if "UNMASKS" in code]
    exec(compile(example, "CONTRIBUTING.md", "exec"), {})
    recipe = Recipe(unmask={"type": "surest-share"})
    assert Recipe.from_json(recipe.to_json()) == recipe
    decoded = decode(FULL, PROMPT_IDS, 8, recipe)
    counts = [[(row == step).sum().item() for step in range(4)] for row in decoded.reveal_step]
    assert counts == [[4, 2, 1, 1]] * len(PROMPTS)
    assert (
        decode(FULL, PROMPT_IDS, 8, recipe.replace(unmask={"type": "surest-share", "share": 1})).nfe.tolist() == [1] * 7
    )
