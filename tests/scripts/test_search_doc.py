"""docs/search.md says what docs/results holds, and the benchmarks behind it compute what they say."""

import json
import math
from pathlib import Path

import pytest

from fewstep.eval.assets import load_pipeline, plan_folder
from fewstep.samplers import InputError, Plan, attach
from fewstep.scripts import search_doc
from fewstep.scripts.bench.excess import baselines, converged_plan, earlier, excess_ratio, save
from fewstep.scripts.bench.transfer import with_scale, with_steps

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
DIT = "demo:fashion-dit"


def row(fd, se=0.5, shift=0.0):
    replicates = tuple(fd + shift + 0.1 * (index % 3) for index in range(20))
    jackknife = {"plain": fd, "replicates": replicates, "sizes": (50,) * 20}
    return {"plan": {}, "n": 1000, "nfe": 5.0, "metrics": {"fd": {"value": fd, "se": se}}, "fd_jackknife": jackknife}


def test_the_document_is_the_generated_one():
    written = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    assert search_doc.document(RESULTS) == written, "run python -m fewstep.scripts.tables"


def test_what_was_not_measured_is_said(tmp_path):
    text = search_doc.document(tmp_path)
    assert text.lower().count("not measured.") == 5


def test_the_share_of_the_excess(tmp_path):
    """A plan at 4 beside a baseline at 8, over a teacher at 3: a fifth."""
    goal = excess_ratio(row(4.0) | {"difference": [-4.0, 0.1]}, row(8.0), row(3.0, se=0.0))
    assert goal["excess"] == 1.0
    assert goal["baseline_excess"] == 5.0
    assert goal["ratio"] == pytest.approx(0.2)
    assert goal["se"] == pytest.approx(math.hypot(0.1, 0.8 * 0.5) / 5.0)
    found = {
        "pipe": DIT,
        "n": 1000,
        "converged": {"best": "ddpm", "rows": {"ddpm": row(3.0)}},
        "budgets": {
            "5": {
                "baseline": "unipc",
                "baselines": {"unipc": row(8.0)},
                "baseline_others": {"precision": {"value": 0.9, "se": 0.01}},
                "plan": row(4.0) | {"difference": [-4.0, 0.1]},
                "plan_others": {"precision": {"value": 0.8, "se": 0.01}},
                "goal": goal,
            }
        },
    }
    below = excess_ratio(row(2.0) | {"difference": [-0.5, 0.1]}, row(2.5), row(3.0, se=0.0))
    found["budgets"]["10"] = found["budgets"]["5"] | {"goal": below}
    (tmp_path / "excess-dit.json").write_text(json.dumps(found))
    text = search_doc.document(tmp_path)
    assert "| -4.00 ± 0.10 | -1.00 and -0.50 |" in text  # a share of what is not there would say nothing
    assert "| 5 | `unipc` 8.00 ± 0.50 | 4.00 ± 0.50 | -4.00 ± 0.10 | 0.20 ± 0.08 | **0.900 to 0.800 ± 0.010** |" in text


def test_results_are_added_to_and_shares_follow_the_best_converged_row(tmp_path):
    out, said = tmp_path / "excess.json", {"pipe": DIT, "n": 1000, "seed": 1}
    budget = {"baseline": "unipc", "baselines": {"unipc": row(8.0)}, "plan": row(4.0) | {"difference": [-4.0, 0.1]}}
    assert earlier(out, said) == {}
    result = said | {"converged": {"rows": {"ddpm": row(3.0)}}, "budgets": {"10": budget, "5": dict(budget)}}
    save(out, result)
    with pytest.raises(InputError, match=r"has results of other settings \(\{'n': 1000\}\); give another --out"):
        earlier(out, said | {"n": 500})
    kept = earlier(out, said)
    assert list(kept["budgets"]) == ["5", "10"]
    assert kept["budgets"]["5"]["goal"]["ratio"] == pytest.approx(0.2)
    kept["converged"]["rows"]["ddpm:karras"] = row(2.0)
    save(out, kept)
    again = earlier(out, said)
    assert again["converged"]["best"] == "ddpm:karras"
    assert [entry["goal"]["ratio"] for entry in again["budgets"].values()] == pytest.approx([1 / 3, 1 / 3])


def test_a_converged_scheduler_is_named_with_its_spacing():
    assert converged_plan(DIT, "unipc")["grid"] == {"type": "spacing", "steps": 100, "spacing": "trailing"}
    assert converged_plan(DIT, "unipc:karras")["solver"]["config"] == {"use_karras_sigmas": True}
    with pytest.raises(InputError, match="got ddpm:karras; its spacings are leading, linspace, trailing"):
        converged_plan(DIT, "ddpm:karras")
    with pytest.raises(InputError, match="got plms; schedulers are ddim, ddpm"):
        converged_plan(DIT, "plms")


def test_evolution_is_compared_with(tmp_path):
    def entry(fd, **said):
        return {
            "trials": {"complete": 7, "pruned": 1},
            "rows": 4000,
            "fresh": row(fd) | {"difference": [-1, 0.2]},
        } | said

    fast = entry(5.0, share_of_rows=0.1, rows_to_reach_baseline=300)
    grid = entry(5.0, share_of_rows=0.05, rows_to_reach_baseline=None)
    found = {
        "pipe": DIT,
        "n": 256,
        "fresh_n": 10_000,
        "steps": {"5": {"autodiffusion": entry(6.0), "fast": fast, "fast-grid": grid}},
    }
    (tmp_path / "evolution-dit.json").write_text(json.dumps(found))
    text = search_doc.document(tmp_path)
    assert "| 5 | `autodiffusion` | 7 complete, 1 pruned | 4,000 | 6.00 ± 0.50 |  |  |  |" in text
    assert "| 4,000 | 5.00 ± 0.50 | -1.00 ± 0.20 | 10.0 % | 300 |" in text
    assert "| 5.0 % | never |" in text
    assert "bench.evolution --pipe demo:fashion-dit --steps 5 --n 256 --fresh_n 10000 --work" in text


def test_commands_say_which_baselines_and_settings(tmp_path):
    def budget(*names):
        return {"baseline": names[0], "baselines": {name: row(8.0) for name in names}}

    converged = {"best": "ddpm", "rows": {"ddpm": row(3.0), "unipc:karras": row(4.0)}}
    budgets = {"4": budget("unipc"), "5": budget("unipc", "deis"), "8": budget("unipc")}
    (tmp_path / "excess-dit.json").write_text(json.dumps({"n": 1000, "converged": converged, "budgets": budgets}))
    setting = {"plan": row(4.0) | {"difference": [-1.0, 0.1]}, "against": row(5.0)}
    settings = {"guidance 1.25": setting, "guidance 2": setting, "4 steps": setting}
    (tmp_path / "transfer-dit.json").write_text(json.dumps({"n": 1280, "settings": settings}))
    text = search_doc.document(tmp_path)
    assert "--top 2 --converged ddpm unipc:karras --converged_n 1000 --budgets 5 --out" in text
    assert "--top 1 --converged --budgets 4 8 --out" in text
    assert "--n 1280 --scales 1.25 2 --steps 4 --out docs/results/transfer-dit.json" in text


def test_baselines_are_the_least_distances_of_a_budget():
    def entry(fd):
        return {"rows": {"5": row(fd) | {"plan": {"solver": fd}}}}

    table = {"solvers": {"a": entry(3.0), "b": entry(1.0), "c": entry(2.0), "d": {"rows": {"5": None}}}}
    assert baselines(table, 5, 2) == {"b": {"solver": 1.0}, "c": {"solver": 2.0}}


@pytest.mark.parametrize("demo", search_doc.DEMOS)
def test_every_plan_that_ships_runs_as_it_says(demo):
    folder = plan_folder(f"demo:{demo}")
    pipe = load_pipeline(f"demo:{demo}")
    for path in sorted(folder.glob("*-step*.json")):
        plan = Plan.load(path)
        assert plan.name == path.stem
        assert plan.evidence
        assert plan.tuned_for.steps == plan.nominal_steps
        call = {"class_labels": [1]} if demo == "fashion-dit" else {"batch_size": 1}
        with attach(pipe, plan) as handle:
            pipe(**call, output_type="np")
        assert not handle.warnings
        assert len(handle.stats.steps) == plan.nominal_steps


def test_plans_in_other_settings():
    pipe = load_pipeline(DIT)
    data = {
        "fewstep_plan": 1,
        "solver": {"type": "diffusers", "scheduler": "UniPCMultistepScheduler"},
        "grid": {"type": "explicit", "timesteps": [800, 500, 200]},
        "guidance": {"type": "guidance", "scale": [1.5, 2.0, 1.0]},
    }
    plan = Plan.from_json(data)
    same = with_steps(pipe, plan, 3)
    assert same.grid.timesteps == pytest.approx(plan.grid.timesteps, abs=0.01)
    more = with_steps(pipe, plan, 5)
    assert (more.grid.timesteps[0], more.grid.timesteps[2], more.grid.timesteps[4]) == pytest.approx((800, 500, 200))
    assert more.guidance.scale == pytest.approx((1.5, 1.75, 2.0, 1.5, 1.0))
    assert with_scale(plan, 2.0).guidance.scale == pytest.approx((2.0, 3.0, 1.0))
    assert with_scale(plan, 1.0).guidance.scale == 1.0
    with pytest.raises(InputError, match="the plan has no guidance to change"):
        with_scale(plan.model_copy(update={"guidance": None}), 2.0)
