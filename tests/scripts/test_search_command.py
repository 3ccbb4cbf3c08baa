"""``fewstep search`` on the demo: each search writes a plan that runs."""

import json
import shutil

import pytest
import torch

from fewstep.eval.assets import DEMO, load_pipeline
from fewstep.eval.scorers import SCORERS
from fewstep.samplers import Plan, attach
from fewstep.samplers.errors import InputError
from fewstep.scripts.cli import main
from fewstep.search import Found, presets

DIT = "demo:fashion-dit"


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline(DIT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plan_file(path, **parts):
    solver = {"type": "diffusers", "scheduler": "DDIMScheduler"}
    path.write_text(json.dumps({"fewstep_plan": 1, "solver": solver} | parts))
    return str(path)


def grid(steps):
    return {"type": "spacing", "steps": steps, "spacing": "trailing"}


def run(pipe, plan, resources=None):
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    scorer = SCORERS["class"].load("fashion-features", None)
    with attach(pipe, plan, {"scorer": scorer} | (resources or {})) as handle:
        pipe(class_labels=[0, 1, 2], generator=generators, output_type="np")
    return handle.stats


def test_aligner(tmp_path, pipe, capsys):
    teacher = plan_file(tmp_path / "teacher.json", grid=grid(3))
    base = plan_file(tmp_path / "base.json", grid=grid(2), guidance={"type": "constant", "scale": 1.5})
    out = tmp_path / "deep" / "aligned.json"
    arguments = ["--plan", base, "--teacher", teacher, "--n", "4", "--iterations", "2", "--out", str(out)]
    assert main(["search", "aligner", "--pipe", DIT, *arguments]) == 0
    assert "aligned.json" in capsys.readouterr().out
    plan = Plan.load(out)
    assert plan.name == "aligned"
    first, last = plan.conditioning.ratios
    assert first != 1.0
    assert last == 1.0
    assert plan.conditioning.guidance == 1.5
    assert run(pipe, plan).nfe == 4


def test_plan(tmp_path, pipe, capsys, monkeypatch):
    """Without an action it is the plan that is searched; the same command goes on, and files travel with the plan."""
    teacher = plan_file(tmp_path / "teacher.json", grid=grid(4), guidance={"type": "constant", "scale": 1.5})
    out = tmp_path / "found" / "two.json"
    few = ["--n", "8", "--trials", "4", "--fresh_n", "8", "--confirm", "2", "--batch_size", "8"]
    arguments = ["--pipe", DIT, "--steps", "2", "--objective", "relative_error", "--teacher", teacher, *few]
    assert main(["search", *arguments, "--out", str(out)]) == 0
    assert "report.html" in capsys.readouterr().out
    found = Found.load(out.with_suffix(".search") / "found.json")
    plan = Plan.load(out)
    assert plan == found.plan.model_copy(update={"name": "two"})
    assert plan.nominal_steps == 2
    assert {each.metric for each in plan.evidence} == {"relative_error", "relative_error difference"}
    assert len(found.history) == 4
    assert found.spent > 0
    assert {candidate.title for candidate in found.baselines} == {"dpmpp-2m-2", "unipc-2", "unipc-karras-2"}
    assert run(pipe, plan).nfe <= 4
    monkeypatch.setattr(presets, "suggest_grids", None)  # the teacher's trajectory is not recorded again
    assert main(["search", "plan", *arguments, "--out", str(out), "--trials", "5"]) == 0
    again = Found.load(out.with_suffix(".search") / "found.json")
    assert [candidate.plan for candidate in again.history[:4]] == [candidate.plan for candidate in found.history]
    assert again.spent > found.spent
    (starts,) = out.with_suffix(".search").glob("starts-*.json")
    starts.write_text("{}")
    assert main(["search", "plan", *arguments, "--out", str(out), "--trials", "5"]) == 2
    assert f"{starts} holds no plans to begin with; delete it, and they are found again" in capsys.readouterr().err


def test_plan_copies_the_files_that_it_names(tmp_path):
    statistics = demo_start()
    start = {"type": "analytic-init", "file": "start.safetensors"}
    (tmp_path / "in").mkdir()
    shutil.copyfile(statistics, tmp_path / "in" / "start.safetensors")
    base = plan_file(tmp_path / "in" / "base.json", grid=grid(2), start=start)
    out = tmp_path / "out" / "found.json"
    few = ["--n", "4", "--trials", "2", "--fresh_n", "4", "--confirm", "1", "--objective", "relative_error"]
    common = ["--pipe", "demo:fashion-unet", "--plan", base, "--teacher", base, "--space", "correction", *few]
    assert main(["search", *common, "--preset", "autodiffusion", "--sampler", "random", "--out", str(out)]) == 0
    assert (out.parent / "start.safetensors").read_bytes() == statistics.read_bytes()
    assert Plan.load(out).start.file == "start.safetensors"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--steps is needed, or a --plan with a grid"),
        (["--steps", "0"], "--steps must be at least 1; got 0"),
        (["--steps", "2", "--preset", "fastest"], "unknown preset 'fastest'; did you mean 'fast'?"),
        (["--steps", "2", "--space", "gird"], "unknown axis of the space 'gird'; did you mean 'grid'?"),
        (["--steps", "2", "--limits", "nfe>=2"], "good values of nfe are <= the limit"),
        (["--steps", "2", "--n", "100"], "fd needs at least 256 images"),
        (["--steps", "2", "--n", "256", "--sampler", "tpee"], "unknown sampler of a search 'tpee'"),
    ],
)
def test_plan_searches_that_cannot_be(tmp_path, capsys, arguments, words):
    out = ["--preset", "autodiffusion"] if "--preset" not in arguments else []
    assert main(["search", "--pipe", DIT, *out, "--out", str(tmp_path / "plan.json"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()


def demo_start():
    (file,) = DEMO.glob("plans/fashion-unet/*start.safetensors")
    return file


def test_cache(tmp_path, pipe, capsys):
    base = plan_file(tmp_path / "base.json", grid=grid(6), guidance={"type": "constant", "scale": 1.5})
    out = tmp_path / "cached.json"
    arguments = ["--cache", "gate", "--budget", "psnr>=15", "--plan", base, "--n", "4", "--out", str(out)]
    assert main(["search", "cache", "--pipe", DIT, *arguments]) == 0
    assert "on fresh seeds" in capsys.readouterr().out
    plan = Plan.load(out)
    assert plan.caches[0].type == "gate"
    assert {e.metric: e.value for e in plan.evidence}["psnr"] >= 15
    assert sum(rows.skipped for rows in run(pipe, plan).modules.values()) > 0


def test_a_budget_that_cannot_be_kept_writes_no_plan(tmp_path, capsys):
    base = plan_file(tmp_path / "base.json", grid=grid(2))
    out = tmp_path / "cached.json"
    arguments = ["--budget", "psnr>=200", "--plan", base, "--n", "2", "--out", str(out)]
    assert main(["search", "cache", "--pipe", DIT, *arguments]) == 2
    assert "no setting of the gate cache within psnr>=200 reused anything in 2 steps" in capsys.readouterr().err
    assert not out.exists()


def test_router(tmp_path, pipe):
    base = plan_file(tmp_path / "base.json", grid=grid(3), guidance={"type": "constant", "scale": 1.5})
    out = tmp_path / "routed.json"
    arguments = ["--n", "4", "--batch_size", "2", "--lr", "3.0", "--penalty", "1.0", "--plan", base, "--out", str(out)]
    assert main(["search", "router", "--pipe", DIT, *arguments]) == 0
    plan = Plan.load(out)
    assert plan.caches[0].type == "router"
    assert len(run(pipe, plan).modules) == 12


def test_adaptive(tmp_path, pipe):
    out = tmp_path / "adaptive.json"
    arguments = ["--n", "20", "--steps", "1", "2", "--out", str(out), "--top", "1"]
    assert main(["search", "adaptive", "--pipe", DIT, *arguments]) == 0
    plan = Plan.load(out)
    assert set(plan.grid.table) == {str(label) for label in range(10)}
    assert 2 <= run(pipe, plan).nfe <= 4
    kept = out.read_bytes()
    assert main(["search", "adaptive", "--pipe", DIT, *arguments]) == 0, "the scores that were kept are used again"
    assert out.read_bytes() == kept


def test_escalate(tmp_path, pipe, capsys):
    student = plan_file(tmp_path / "student.json", grid=grid(2))
    teacher = plan_file(tmp_path / "teacher.json", grid=grid(4))
    out = tmp_path / "escalate.json"
    arguments = ["--plan", student, "--n", "10", "--percentile", "30", "--out", str(out)]
    assert main(["search", "escalate", "--pipe", DIT, *arguments]) == 2
    assert "--teacher is needed: a plan, with a grid" in capsys.readouterr().err
    assert main(["search", "escalate", "--pipe", DIT, *arguments, "--teacher", teacher]) == 0
    plan = Plan.load(out)
    assert plan.models.calibration_n == 10
    assert plan.models.threshold < 0
    assert run(pipe, plan).nfe >= 4


def test_start(tmp_path, pipe):
    late = plan_file(tmp_path / "late.json", grid={"type": "explicit", "timesteps": [900, 500, 100]})
    teacher = plan_file(tmp_path / "teacher.json", grid=grid(2))
    out = tmp_path / "start.json"
    arguments = ["--plan", late, "--teacher", teacher, "--n", "6", "--out", str(out)]
    assert main(["search", "start", "--pipe", DIT, *arguments]) == 0
    assert (tmp_path / "start.start.safetensors").is_file()
    assert run(pipe, Plan.load(out)).nfe == 6


def test_knowledge(tmp_path, pipe, capsys):
    timesteps = {"type": "explicit", "timesteps": [999, 800, 500, 200]}
    redi = {"type": "redi", "key_step": 2, "condition": "class_labels"}
    base = plan_file(tmp_path / "base.json", grid=timesteps, start=redi)
    out = tmp_path / "plan.json"
    assert main(["search", "knowledge", "--pipe", DIT, "--n", "12", "--out", str(out)]) == 2
    assert "--plan is needed: a plan whose start is a redi part" in capsys.readouterr().err
    assert main(["search", "knowledge", "--pipe", DIT, "--plan", base, "--n", "12", "--out", str(out)]) == 0
    assert run(pipe, Plan.load(out)).nfe == 8


def test_bad_options(tmp_path, capsys):
    assert main(["search", "aligner", "--out", str(tmp_path / "plan.txt")]) == 2
    assert "is not a plan file; give a name that ends in .json" in capsys.readouterr().err
    assert main(["search", "start", "--n", "0"]) == 2
    assert "--n must be at least 1; got 0" in capsys.readouterr().err


def test_scorers():
    scorer = SCORERS["class"].load("fashion-features", None)
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = scorer(images, {"class_labels": [0, 1, 2, 3]})
    assert scores.shape == (4,)
    total = torch.stack([scorer(images, {"class_labels": [label] * 4}).exp() for label in range(10)]).sum(0)
    torch.testing.assert_close(total, torch.ones(4))
    with pytest.raises(InputError, match="the class scorer needs class_labels in the call; got prompt"):
        scorer(images, {"prompt": ["a shoe"] * 4})
    with pytest.raises(InputError, match="--scorer clip needs --net_path, a local CLIP folder"):
        SCORERS["clip"].load("clip", None)
