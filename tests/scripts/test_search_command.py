"""``fewstep search`` on the demo: each search writes a plan that runs."""

import json

import pytest
import torch

from fewstep.eval.assets import load_pipeline
from fewstep.eval.scorers import SCORERS
from fewstep.samplers import Plan, attach
from fewstep.samplers.errors import InputError
from fewstep.scripts.cli import main

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
