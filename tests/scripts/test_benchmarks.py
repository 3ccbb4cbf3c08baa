"""The benchmarks choose on the seeds they say and compare what they say, on a judge with a known answer."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from fewstep.samplers import Plan
from fewstep.scripts.bench import guidance_window, parts, time_shift
from fewstep.scripts.bench.judge import best, compared, fd
from fewstep.scripts.bench.solvers import SOLVERS


@dataclass
class FakeJudge:
    """Scores plans by a formula instead of images."""

    distance: object
    pipe: str = "demo:fashion-unet"
    asked: list = field(default_factory=list)

    def row(self, plan):
        self.asked.append(plan)
        value = self.distance(plan)
        replicates = [value + 0.1 * block for block in range(20)]
        return {
            "plan": plan,
            "n": 100,
            "metrics": {"fd": {"value": value, "se": 1.0}},
            "fd_jackknife": {"plain": value, "replicates": replicates, "sizes": [5] * 20},
        }


def table(tmp_path, **spacings):
    screened = {name: {"screened": {"5": {"spacing": one}, "10": {"spacing": one}}} for name, one in spacings.items()}
    path = tmp_path / "solvers.json"
    path.write_text(json.dumps({"solvers": screened}))
    return path


def case(plan, judge=None, screen=None, guided=False, cells=None):
    bench = SimpleNamespace(judge=judge, screen=screen, guided=guided, cells=cells or {})
    return parts.Case(bench, "dpmpp-2m", 5, "karras", plan)


def plan_of(name, spacing="leading", guidance=None):
    return SOLVERS[name].plans(5, guidance)[spacing]


def test_a_difference_is_paired_and_replicates_are_left_out():
    judge = FakeJudge(lambda plan: plan["value"])
    found = compared(judge.row({"value": 3.0}), judge.row({"value": 5.0}))
    assert found["difference"] == pytest.approx((-2.0, 0.0), abs=1e-12)
    assert "fd_jackknife" not in found
    assert "difference" not in compared(judge.row({"value": 3.0}))


def test_the_best_is_the_least():
    judge = FakeJudge(lambda plan: plan)
    assert best((value, judge.row(value)) for value in (3.0, 1.0, 2.0))[0] == 1.0


def test_the_spacing_is_the_one_that_was_chosen_or_is_chosen_on_the_screening_seeds(tmp_path):
    solvers = table(tmp_path, ddim="trailing")
    screen = FakeJudge(lambda plan: 1.0 + len(plan["grid"]["spacing"]))
    assert time_shift.base_plan("ddim", 10, screen, solvers)[0] == "trailing"
    assert screen.asked == []
    spacing, plan = time_shift.base_plan("ddpm", 10, screen, solvers)
    assert spacing == plan["grid"]["spacing"] == "leading"
    assert len(screen.asked) == 3
    assert plan["grid"]["steps"] == 10


def test_the_grid_of_the_time_shift_part_is_whole_and_its_best_cell_is_reported():
    def distance(plan):
        cell = plan.get("conditioning")
        return 9.0 if cell is None else abs(cell["window"] - 20) + cell["cutoff"] / 100

    search, judge = FakeJudge(distance), FakeJudge(lambda plan: 7.0)
    plan = plan_of("ddim")
    cells = time_shift.searched(search, plan, [10, 20], [0, 300])
    assert [(cell["window"], cell["cutoff"], fd(cell)) for cell in cells] == [
        (10, 0, 10.0),
        (10, 300, 13.0),
        (20, 0, 0.0),
        (20, 300, 3.0),
    ]
    assert cells[0]["difference"][0] == pytest.approx(1.0)
    rows = time_shift.reported(judge, plan, cells[2], 0.4)
    assert list(rows) == ["plain", "residual", "data-variance"]
    for made in judge.asked[1:]:
        Plan.from_json({"fewstep_plan": 1} | made)
    assert judge.asked[2]["conditioning"]["data_variance"] == 0.4


def test_scales_are_chosen_on_the_screening_seeds():
    screen = FakeJudge(lambda plan: abs(plan["correction"]["scale"] - 1.02))
    chosen = parts.epsilon_scaling(case(plan_of("ddim"), screen=screen))
    assert chosen["correction"]["scale"] == 1.02
    assert len(screen.asked) == len(parts.SCALES)


@pytest.mark.parametrize("spacing", SOLVERS["dpmpp-2m"].plans(5, None))
def test_other_grids_take_as_many_steps_and_drop_the_sigmas(spacing):
    plan = SOLVERS["dpmpp-2m"].plans(5, None)[spacing]
    one = parts.Case(SimpleNamespace(), "dpmpp-2m", 5, spacing, plan)
    for changed in (parts.early_start(one), parts.zero_snr(one)):
        parsed = Plan.from_json({"fewstep_plan": 1} | changed)
        assert parsed.nominal_steps == 5
        assert parsed.solver.config == {}
    assert parts.early_start(one)["grid"]["options"] == {"first": 800}


def test_guidance_is_for_demos_that_are_guided():
    scale = {"type": "constant", "scale": 1.5}
    assert parts.guidance(case(plan_of("dpmpp-2m"))) is None
    assert parts.redi(case(plan_of("dpmpp-2m"))) is None
    guided = parts.guidance(case(plan_of("dpmpp-2m", guidance=scale), guided=True))
    assert guided["guidance"] == {"type": "guidance", "scale": 1.5, "window": parts.WINDOW}
    for window in guidance_window.WINDOWS:
        Plan.from_json({"fewstep_plan": 1} | guidance_window.windowed(guided, window))


def test_rows_are_compared_with_the_plain_one_and_with_what_they_contain(monkeypatch):
    judge = FakeJudge(lambda plan: {"plain": 9.0, "early": 5.0, "init": 4.0}[plan["is"]])
    monkeypatch.setitem(parts.PARTS, "early-start", lambda case: {"is": "early"})
    monkeypatch.setitem(parts.PARTS, "analytic-init", lambda case: {"is": "init"})
    monkeypatch.setitem(parts.PARTS, "guidance", lambda case: None)
    rows = dict(parts.rows_of(case({"is": "plain"}, judge), ["early-start", "analytic-init", "guidance"]))
    assert list(rows) == ["plain", "early-start", "analytic-init"]
    assert rows["analytic-init"]["difference"][0] == pytest.approx(-5.0)
    assert rows["analytic-init"]["beside"][0] == pytest.approx(-1.0)
    assert "beside" not in rows["early-start"]


def test_the_time_shift_cell_of_a_solver_that_was_not_searched_is_that_of_dpm_solver():
    cells = {"dpmpp-2m": {"window": 20, "cutoff": 300}}
    one = case(plan_of("unipc"), cells=cells)
    assert parts.time_shift(one)["conditioning"] == {"type": "time-shift", "window": 20, "cutoff": 300}
