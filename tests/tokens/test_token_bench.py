"""The bench of token models, on untrained ones: its rows, files and report."""

import csv
import json
import re

import pytest
import torch
from html_page import Page, check_self_contained, words
from rich.console import Console

from fewstep.eval import assets
from fewstep.eval.options import BenchOptions
from fewstep.eval.report import write_report
from fewstep.eval.report_answers import LONGEST
from fewstep.eval.report_runs import load_bench
from fewstep.eval.run import run_bench
from fewstep.eval.shares import Shares
from fewstep.eval.table import bench_table
from fewstep.eval.timing import Spread, Throughput, Timing
from fewstep.eval.tokens import TASKS, causal_answers, load_token_models, models, task_questions
from fewstep.eval.tokens import bench as bench_module
from fewstep.eval.tokens.rows import LITERATURE, control_tokens, token_rows
from fewstep.eval.tokens.timing import AnswerTiming
from fewstep.samplers import InputError
from fewstep.samplers.files import write_json
from fewstep.samplers.tokens import RECIPES, EosExit, Fixed, Quota, Recipe, Threshold, decode
from fewstep.scripts.demo import train_tokens

MEASURED = {
    "latency_s", "latency_q1_s", "latency_q3_s", "answers_per_s", "tokens_per_s", "peak_bytes", "flops", "kv_bytes"
}  # fmt: skip
FEW = ("fast-dllm", "fast-dllm-dual", "fast-dllm-v2")
N = 9
LENGTH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The three kinds of models, tiny and with logits that are far apart."""
    root = tmp_path_factory.mktemp("given") / "tokens"
    for seed, kind in enumerate(train_tokens.KINDS):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = train_tokens.new_model(width=32, layers=1)
            for parameter in model.parameters():
                parameter.data *= 1.0 if parameter.ndim == 1 else 12.0
        train_tokens.save_model(kind, root / kind, model)
    return root


@pytest.fixture(scope="module", autouse=True)
def _demo(folder):
    """The tiny models as ``demo:tokens``, with few presets and few calls to time."""
    patch = pytest.MonkeyPatch()
    patch.setattr(models, "DEMO", folder.parent)
    patch.setattr(assets, "DEMO", folder.parent)
    patch.setattr("fewstep.eval.tokens.rows.LITERATURE", FEW)
    patch.setattr("fewstep.eval.tokens.timing.MOST_TASKS", 3)
    patch.setattr("fewstep.eval.tokens.timing.PATIENCE_S", 0.0)
    patch.setattr("fewstep.eval.shares.REPEATS", 1)
    yield
    patch.undo()


@pytest.fixture
def untimed(monkeypatch):
    """Timings from nowhere, and no page: what these take is most of a small bench."""

    def measured(ask, questions, *, batch_size, **_):
        spread = Spread.of([1.0])
        throughput = Throughput(batch_size, 2.0, (1.0,))
        return AnswerTiming(Timing(1.0, spread, throughput, Shares(0, 1, 0, 0, 1), None, 1, "rss", 1, 1), 5, 7)

    monkeypatch.setattr(bench_module, "measure_answers", measured)
    monkeypatch.setattr(bench_module, "write_report", lambda out: None)


def options(out, **changes):
    given = {"pipe": "demo:tokens", "out": out, "n": N, "gen_length": LENGTH, "batch_size": 4, "timing_repeats": 1}
    return BenchOptions(**given | {"device": "cpu"} | changes)


def run(out, **changes):
    return run_bench(options(out, **changes), command="fewstep bench", console=Console(quiet=True))


def table(out):
    """results.csv without what the timing measures, by name."""
    with (out / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {row["name"]: {key: value for key, value in row.items() if key not in MEASURED} for row in rows}


def record(out, name):
    return json.loads((out / "runs" / f"{name}.json").read_text())


def kept(out):
    return {path.name: path.read_bytes() for path in sorted((out / "answers").iterdir())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("finished") / "out")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_token_models(str(folder))


def test_rows_and_columns(finished):
    rows = table(finished)
    baselines = {"one-token-eot", "static-2", "static-4", "static-8", "autoregressive"}
    assert {name for name, row in rows.items() if row["role"] == "baseline"} == baselines
    assert {name for name, row in rows.items() if row["role"] == "plan"} == set(FEW)
    assert rows["one-token"]["role"] == "reference"
    assert float(rows["one-token"]["nfe"]) == LENGTH
    wanted = {"exact", "token_forwards", "tokens_per_forward", "worst_accuracy", "worst_accuracy_se"}
    assert wanted | {f"accuracy_{task}" for task in TASKS} <= rows["static-2"].keys()
    with (finished / "results.csv").open() as stream:
        header = stream.readline().strip().split(",")
    assert header.index("worst_accuracy") < header.index("mean_accuracy") < header.index("accuracy_copy")
    assert set(header) >= MEASURED
    assert {name: rows[name]["exact"] for name in ("one-token", "fast-dllm", "fast-dllm-v2", "autoregressive")} == (
        dict.fromkeys(("one-token", "fast-dllm", "fast-dllm-v2", "autoregressive"), "true")
    )
    assert rows["fast-dllm-dual"]["exact"] == "false"
    kept_bytes = {name: record(finished, name)["decoding"]["kv_bytes"] for name in rows}
    assert kept_bytes["one-token"] == 0
    assert min(kept_bytes[name] for name in ("fast-dllm-dual", "autoregressive")) > 0


def test_answers_of_rows_are_those_of_decoding_by_hand(finished, loaded):
    recipes = {
        "one-token": Recipe(unmask=Quota(tokens=1)),
        "static-4": Recipe(blocks=Fixed(length=32), unmask=Quota(tokens=4), exit=EosExit()),
        "fast-dllm": RECIPES["fast-dllm"],
    }
    questions = task_questions(range(N))
    for name, recipe in recipes.items():
        run = record(finished, name)
        answers = json.loads((finished / "answers" / f"{run['config_hash']}.json").read_text())["answers"]
        assert [answer["seed"] for answer in answers] == list(range(N))
        costs = []
        for answer, question in zip(answers, questions, strict=True):
            ids = loaded.ids(question.prompt)
            alone = decode(loaded.denoisers["masked"], [ids], LENGTH, recipe, seeds=[question.seed])
            assert answer["text"] == loaded.text(alone.answers[0])
            assert (answer["nfe"], answer["token_forwards"]) == (int(alone.nfe), int(alone.token_forwards))
            assert answer["right"] == question.accepts(answer["text"])
            reveal = alone.reveal_step[0, alone.answer_start :].tolist()
            assert answer["steps"] == reveal[: len(answer["text"])]
            costs.append((int(alone.nfe), int(alone.token_forwards), float(alone.tokens_per_forward)))
        nfe, token_forwards, tokens_per_forward = (sum(column) / N for column in zip(*costs, strict=True))
        assert run["nfe"] == pytest.approx(nfe)
        assert run["decoding"]["token_forwards"] == pytest.approx(token_forwards)
        assert run["decoding"]["tokens_per_forward"] == pytest.approx(tokens_per_forward)


def test_costs_of_the_twin_are_those_that_its_network_sees(loaded):
    seen = []
    hook = loaded.causal.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    question = task_questions([5])
    (answer,) = causal_answers(loaded, question, LENGTH)
    hook.remove()
    assert (answer.nfe, answer.token_forwards) == (len(seen), sum(seen))
    assert seen[0] == len(loaded.ids(question[0].prompt)) + 1
    layer = loaded.causal.model.config
    width = layer.num_key_value_heads * layer.head_dim
    assert answer.kv_bytes == 2 * 4 * layer.num_hidden_layers * width * answer.token_forwards


def test_record_says_everything(finished):
    run = record(finished, "fast-dllm-v2")
    assert run["decoding"] | {"tokens_per_s": 0, "device": ""} == run["decoding"] | {
        "network": "block", "gen_length": LENGTH, "batch_size": 4, "torch_threads": torch.get_num_threads(),
        "failed": 0, "tokens_per_s": 0, "device": "",
    }  # fmt: skip
    assert run["control"] is not None
    assert record(finished, run["control"])["decoding"]["network"] == "block"
    assert record(finished, run["control"])["nfe"] <= run["nfe"]
    assert run["config"]["plan"]["cache"] == {"type": "block-prefix"}
    assert (run["n"], run["seeds"], run["paired"]["against"]) == (N, [0, N], "one-token")
    assert run["metrics"]["accuracy_copy"]["n"] == 2
    timing = run["timing"]
    assert len(timing["latency_s"]["values"]) == 3
    assert timing["shares_s"]["denoise_s"] > 0
    speed = run["decoding"]["tokens_per_s"] / timing["throughput"]["images_per_s"]
    answers = json.loads((finished / "answers" / f"{run['config_hash']}.json").read_text())["answers"]
    assert speed == pytest.approx(sum(answer["new_tokens"] for answer in answers[:4]) / 4)


def test_same_command_again_changes_nothing(finished):
    before = {path: path.read_bytes() for path in sorted(finished.rglob("*")) if path.is_file()}
    run(finished)
    assert before == {path: path.read_bytes() for path in sorted(finished.rglob("*")) if path.is_file()}


def test_stopped_and_resumed_with_another_batch_gives_the_same(finished, untimed, tmp_path):
    out, ask, calls = tmp_path / "out", bench_module.answers, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return ask(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_module, "answers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(out, batch_size=2)
    assert not (out / "results.csv").exists()
    assert any(len(json.loads(text)["answers"]) == 4 for text in kept(out).values())
    run(out, batch_size=5)
    assert kept(out) == kept(finished)
    assert table(out) == table(finished)


def test_larger_n_goes_on_and_other_settings_are_refused(finished, untimed, tmp_path):
    out = run(tmp_path / "out", n=8)
    before = {name: json.loads(text)["answers"] for name, text in kept(out).items()}
    old = record(out, "static-2") | {"name": "static-31", "role": "control"}
    write_json(out / "runs" / "static-31.json", old)
    run(out)
    assert not (out / "runs" / "static-31.json").exists()
    assert {name: json.loads(text)["answers"][:8] for name, text in kept(out).items() if name in before} == before
    shared = table(out)
    assert {name: shared[name] for name in table(finished)} == table(finished)
    with pytest.raises(InputError, match="holds runs of other weights or settings"):
        run(out, gen_length=LENGTH + 1)
    with pytest.raises(InputError, match="holds runs of other weights or settings"):
        run(out, seed=1)


def test_recipes_of_the_user(folder, untimed, tmp_path):
    Recipe(blocks=Fixed(length=6), unmask=Threshold(threshold=0.5)).save(tmp_path / "mine.json")
    lines = [{"task": "say", "prompt": f"copy {word}\n", "answers": [word]} for word in "abcde"]
    lines += [{"task": "yes", "prompt": word, "answers": ["y"]} for word in "abcd"]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = run(
        tmp_path / "out", pipe=str(folder), questions=tmp_path / "asked.jsonl",
        plans=(tmp_path / "mine.json", type(tmp_path)("fast-dllm-dual"), type(tmp_path)("eoser")),
    )  # fmt: skip
    rows = table(out)
    assert {"mine", "fast-dllm-dual", "eoser"} <= rows.keys()
    assert {"accuracy_say", "accuracy_yes"} <= rows["mine"].keys()
    assert rows["mine"]["pipe"] == str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": (3,), "net": "inception"}, "--steps, --net: not for token models; leave them out"),
        ({"plans": ("fast-dlm",)}, "unknown recipe 'fast-dlm'; did you mean 'fast-dllm'"),
        ({"plans": ("nowhere.json",)}, "nowhere.json does not exist"),
        ({"plans": ("mdlm", "bad.json")}, "bad.json is not a fewstep recipe"),
        ({"plans": ("odd.json",)}, "5 steps cannot be shared equally by 2 blocks"),
        ({"plans": ("static-2.json",)}, "two rows are called 'static-2'; give one of the plans another name"),
        ({"questions": "none.jsonl"}, "cannot read none.jsonl"),
        (
            {"questions": "eight.jsonl"},
            f"--n {N} asks {N} different questions, and eight.jsonl holds 8; give --n 8, or more questions",
        ),
        ({"questions": "few.jsonl"}, "few.jsonl holds 7; give more questions"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "bad.json", {"fewstep_plan": 1})
    Recipe(blocks=Fixed(length=4), unmask=Quota(steps=5)).save(tmp_path / "odd.json")
    Recipe(unmask=Quota(tokens=3)).save(tmp_path / "static-2.json")
    line = json.dumps({"task": "yes", "prompt": "x", "answers": ["y"]})
    for name, count in (("eight", 8), ("few", 7)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join([line] * count))
    path = type(tmp_path)
    for name in ("plans", "questions"):
        if name in changes:
            value = changes[name]
            changes = changes | {name: tuple(map(path, value)) if isinstance(value, tuple) else path(value)}
    with pytest.raises(InputError, match=re.escape(message)):
        run(path("out"), **changes)
    assert not (tmp_path / "out").exists()


def test_folders_need_questions_and_images_have_none(folder, tmp_path):
    with pytest.raises(InputError, match=r"tokens has no questions of its own; give --questions FILE"):
        run(tmp_path / "out", pipe=str(folder))
    with pytest.raises(InputError, match=r"--gen_length, --questions: not for a pipeline of images; leave them out"):
        run(tmp_path / "out", pipe=str(tmp_path), questions=tmp_path / "q.jsonl")


def test_presets_that_no_network_runs_are_left_out_with_a_reason(loaded):
    masked = {"masked": loaded.denoisers["masked"]}
    alone = models.TokenModels(loaded.spec, loaded.tokenizer, masked, None)
    found = token_rows(alone, [], task_questions([0])[0], LENGTH)
    assert [row.name for row in found.rows][-2:] == ["fast-dllm", "fast-dllm-dual"]
    assert "autoregressive" not in {row.name for row in found.rows}
    assert re.match("fast-dllm-v2 is left out: the denoiser has full attention and no blocks", found.left_out[0])


def test_a_block_causal_model_alone_is_asked_block_by_block(loaded):
    alone = models.TokenModels(loaded.spec, loaded.tokenizer, {"block": loaded.denoisers["block"]}, None)
    rows = token_rows(alone, [], task_questions([0])[0], LENGTH).rows
    assert {row.recipe.blocks for row in rows if row.role != "plan"} == {Fixed(length=None)}
    assert {row.name for row in rows if row.role == "plan"} == set(FEW)


def test_every_preset_of_the_literature_runs(loaded, monkeypatch):
    monkeypatch.setattr("fewstep.eval.tokens.rows.LITERATURE", LITERATURE)
    for length in (7, 64):
        found = token_rows(loaded, [], task_questions([0])[0], length)
        assert found.left_out == ()
        assert {row.name: row.network for row in found.rows if row.network != "masked"} == {
            "autoregressive": "ar",
            "fast-dllm-v2": "block",
        }


@pytest.mark.parametrize(("nfe", "tokens"), [(64, 1), (32, 1), (31.9, 2), (16, 2), (10, 4), (1, 32), (0.5, 32), (7, 5)])
def test_controls_are_the_fewest_tokens_whose_evaluations_are_not_above(nfe, tokens):
    assert control_tokens(nfe, lambda k: -(-32 // k), 32) == tokens


def test_page_shows_answers_and_speaks_of_them(finished):
    html = (finished / "report.html").read_text()
    check_self_contained(html)
    text = words(html)
    assert "images" not in text
    assert "Fréchet" not in text
    assert "latency of one answer" in text
    assert "token-forwards per answer" in text
    assert "Would a fixed number of tokens a step do?" in text
    assert "Against the best static quota of equal number of evaluations" in text
    assert "The smallest of several noisy shares is biased downwards" in text
    assert "Rows in order of cost" in text
    headings = "".join(Page(html).text)
    for heading in ("exact", "token-forwards", "tokens per forward", "tokens/s", "answers/s", "worst_accuracy"):
        assert heading in headings
    answers = json.loads((finished / "answers" / f"{record(finished, 'static-2')['config_hash']}.json").read_text())
    for answer in answers["answers"][:8]:
        for line in filter(None, answer["text"][:LONGEST].split("\n")):
            assert line.split()[0][:1] in text
        assert answer["prompt"].strip() in text
    titles = {attrs["title"] for attrs in Page(html).all("span") if attrs.get("title", "").startswith("step ")}
    assert titles <= {f"step {step}" for step in range(1, LENGTH + 1)}
    assert len(titles) > 2
    assert "✗ wrong" in text


def test_page_without_answers_says_so_and_foreign_ones_are_refused(untimed, tmp_path):
    out = run(tmp_path / "out", n=8)
    files = sorted((out / "answers").iterdir())
    files[0].write_bytes(files[1].read_bytes())
    with pytest.raises(InputError, match=r"belongs to another configuration \(.*\); delete it and run again"):
        run(out, n=8)
    for path in files:
        path.unlink()
    assert "The answers of these runs are gone" in words(write_report(out).read_text())


def test_terminal_table_has_exactness(finished):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(bench_table(load_bench(finished), console.width))
    text = console.export_text()
    for heading in ("exact", "token-forwards", "answers/s", "worst_accuracy"):
        assert heading in text


@pytest.mark.usefixtures("untimed")
def test_controls_answer_even_where_no_search_asked_them(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_module, "control_tokens", lambda *_: 7)
    out = run(tmp_path / "out")
    assert record(out, "fast-dllm")["control"] == "static-7"
    assert record(out, "static-7")["n"] == N
    assert len(table(out)) == len(list((out / "answers").iterdir()))
