"""``fewstep doctor``: its table, its JSON, and its exit status."""

import json

import pytest

from fewstep.samplers import Plan, SpacingGrid, TimeShift
from fewstep.scripts.cli import main


def test_a_demo_without_a_plan(capsys):
    assert main(["doctor"]) == 0
    assert "grid: explicit" in capsys.readouterr().out


def test_a_shipped_plan_as_json(capsys):
    assert main(["doctor", "--plan", "fashion-dit/reference", "--json", "true"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_a_plan_that_cannot_run_gives_status_1(tmp_path, capsys):
    plan = Plan(
        grid=SpacingGrid(steps=4), conditioning=TimeShift(window=10, criterion="data-variance", data_variance=1.0)
    )
    plan.save(tmp_path / "plan.json")
    assert main(["doctor", "--plan", str(tmp_path / "plan.json"), "--json", "true"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [f["subject"] for f in report["findings"] if f["verdict"] == "refused"] == ["conditioning: time-shift"]


@pytest.mark.parametrize("teacher", ["fashion-dit", "fashion-unet"])
def test_the_self_test_runs_the_demo(teacher, capsys):
    plan = f"{teacher}/reference"
    assert main(["doctor", "--pipe", f"demo:{teacher}", "--plan", plan, "--self_test", "true", "--json", "true"]) == 0
    assert "50 steps" in json.loads(capsys.readouterr().out)["findings"][-1]["text"]


def test_an_unknown_plan_is_bad_input(capsys):
    assert main(["doctor", "--plan", "fashion-dit/referense"]) == 2
    assert "did you mean 'fashion-dit/reference'" in capsys.readouterr().err
