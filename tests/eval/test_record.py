import dataclasses
import json

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import tiny_dit, tiny_unet

from fewstep.eval.baselines import Row, baseline_rows, check_names, control_row, control_steps
from fewstep.eval.conditions import Conditions
from fewstep.eval.record import (
    component_prints,
    digest,
    is_final,
    read_run,
    refuse_strangers,
    run_path,
    sampling_config,
)
from fewstep.samplers import InputError, Plan, StartStatistics, attach

CONDITIONS = Conditions("labels", (0, 1))
PLAN = {
    "fewstep_plan": 1,
    "name": "a",
    "solver": {"type": "diffusers", "scheduler": "DDIMScheduler", "config": {}},
    "grid": {"type": "spacing", "steps": 4, "spacing": "trailing"},
    "guidance": {"type": "constant", "scale": 1.5},
}


def config(plan=None, pipe=None, kwargs=None, conditions=CONDITIONS, seed=0, spec="x"):
    return sampling_config(
        pipe or tiny_dit(), spec, Plan.from_json(PLAN | (plan or {})), conditions, kwargs or {}, seed
    )


def test_hash_is_of_the_files_that_a_plan_reads(tmp_path):
    """A plan names its statistics by file; another file of that name is another configuration."""
    start = PLAN | {"start": {"type": "analytic-init", "file": "start.safetensors"}}
    (tmp_path / "plan.json").write_text(json.dumps(start))

    def hash_now():
        return sampling_config(tiny_dit(), "x", Plan.load(tmp_path / "plan.json"), CONDITIONS, {}, 0).hash

    StartStatistics(torch.zeros(4, 4, 4), 0.5, 10, "").save(tmp_path / "start.safetensors")
    first = hash_now()
    assert hash_now() == first
    StartStatistics(torch.zeros(4, 4, 4), 0.6, 10, "").save(tmp_path / "start.safetensors")
    assert hash_now() != first


def test_hash_is_of_what_moves_a_sample():
    base = config()
    other_weights = tiny_dit()
    other_weights.transformer.proj_out_1.bias.data.add_(1)
    changed = {
        "plan": config({"grid": {"type": "spacing", "steps": 5, "spacing": "trailing"}}),
        "call": config(kwargs={"eta": 0.5}),
        "conditions": config(conditions=Conditions("labels", (1, 0))),
        "seed": config(seed=1),
        "dtype": config(pipe=tiny_dit().to(dtype=torch.float16)),
        "weights": config(pipe=other_weights),
        "scheduler": config(pipe=tiny_dit(DDIMScheduler(prediction_type="epsilon"))),
        "versions": dataclasses.replace(base, versions={"torch": "1.0", "diffusers": "0.1"}),
    }
    hashes = {name: value.hash for name, value in changed.items()}
    assert len({base.hash, *hashes.values()}) == len(changed) + 1, hashes


def test_hash_is_not_of_names_and_evidence():
    base = config().hash
    evidence = [{"metric": "fd_fashion", "value": 3.0, "n": 100}]
    assert config({"name": "b"}).hash == base
    assert config({"evidence": evidence}).hash == base
    assert config(spec="elsewhere").hash == base
    assert config().hash == base


def test_model_hash_is_shared_by_the_rows_of_a_bench():
    assert config().model_hash == config({"grid": {"type": "spacing", "steps": 9}}).model_hash
    assert config().model_hash != config(kwargs={"eta": 0.5}).model_hash


def test_config_says_everything_in_json():
    value = json.loads(json.dumps(config().to_json()))
    assert value["pipe"] == "x"
    assert value["pipe_class"] == "DiTPipeline"
    assert value["plan"]["name"] == "a"
    assert set(value["components"]) == {"transformer", "vae", "scheduler"}
    assert value["components"]["scheduler"]["class"] == "DDIMScheduler"
    assert value["versions"]["diffusers"].count(".") == 1


def test_digest_ignores_the_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def write_run(out, name="row", **changes):
    run = {
        "format": 1, "name": name, "role": "baseline", "config_hash": "c", "model_hash": "m", "request": "r",
        "n": 10, "seeds": [0, 10], "config": {"pipe": "demo:toy"},
    }  # fmt: skip
    run_path(out, name).parent.mkdir(parents=True, exist_ok=True)
    run_path(out, name).write_text(json.dumps(run | changes))


def test_final_means_the_same_request(tmp_path):
    assert not is_final(tmp_path, "row", "r")
    write_run(tmp_path)
    assert is_final(tmp_path, "row", "r")
    assert not is_final(tmp_path, "row", "other")


def test_damaged_runs_are_refused(tmp_path):
    write_run(tmp_path)
    path = run_path(tmp_path, "row")
    path.write_text(path.read_text()[:30])
    with pytest.raises(InputError, match="is not valid JSON"):
        is_final(tmp_path, "row", "r")
    write_run(tmp_path, format=99)
    with pytest.raises(InputError, match="is not a run of this version of fewstep; delete it"):
        read_run(path)


def test_folder_of_another_pipeline_is_refused(tmp_path):
    write_run(tmp_path)
    refuse_strangers(tmp_path, "m", (0, 10), {"row"})
    with pytest.raises(
        InputError, match=r"holds runs of other weights or settings \(demo:toy, row row\); give another"
    ):
        refuse_strangers(tmp_path, "other", (0, 10), {"row"})


def test_rows_of_other_seeds_are_refused_unless_they_are_made_again(tmp_path):
    write_run(tmp_path)
    refuse_strangers(tmp_path, "m", (0, 20), {"row"})
    with pytest.raises(InputError, match="holds row row on seeds 0 to 9, not 0 to 19; give --n 10 --seed 0"):
        refuse_strangers(tmp_path, "m", (0, 20), {"another"})


def test_baselines_are_guided_and_spaced_alike_and_run():
    pipe = tiny_dit()
    rows = baseline_rows(pipe, Plan.from_json(PLAN), (2, 3))
    assert [row.name for row in rows] == [
        f"{solver}-{steps}" for steps in (2, 3) for solver in ("ddim", "dpmpp-2m", "unipc", "euler")
    ]
    for row in rows:
        assert row.plan.guidance == Plan.from_json(PLAN).guidance
        assert row.plan.to_json()["grid"]["spacing"] == "trailing"
        with attach(pipe, row.plan) as handle:
            pipe(class_labels=[1], output_type="np")
        assert handle.stats.nfe == 2 * row.plan.nominal_steps


def test_unconditional_baselines_have_no_guidance():
    plan = Plan.from_json({"fewstep_plan": 1, "grid": {"type": "spacing", "steps": 4}})
    (row, *_) = baseline_rows(tiny_unet(), plan, (5,))
    assert row.plan.guidance is None


def test_flow_matching_has_flow_baselines():
    from tiny import tiny_sd3

    rows = baseline_rows(tiny_sd3(), Plan(), (5,))
    assert [row.name for row in rows] == ["flow-euler-5"]


class Took:
    """A timing of which only the latency is looked at."""

    def __init__(self, median):
        self.latency_s = type("Spread", (), {"median": median})


def test_control_takes_as_many_steps_as_fit_in_the_plans_time():
    assert control_steps(Took(0.11), Took(1.0), 50) == 6  # 0.11 / 0.02 = 5.5
    assert control_steps(Took(0.001), Took(1.0), 50) == 1
    assert control_steps(Took(9.0), Took(1.0), 50) == 50
    row = control_row(Plan.from_json(PLAN), 6)
    assert row.role == "control"
    assert row.name == "control-ddim-6"
    assert row.plan.nominal_steps == 6
    assert row.plan.guidance == Plan.from_json(PLAN).guidance


def test_control_needs_a_rule_for_its_steps():
    explicit = Plan.from_json(PLAN | {"grid": {"type": "explicit", "timesteps": [900, 500, 100]}})
    with pytest.raises(InputError, match="needs a grid of type 'spacing'"):
        control_row(explicit, 6)


def test_names_are_unique_and_file_names():
    plan = Plan()
    with pytest.raises(InputError, match="two rows are called 'A'"):
        check_names([Row("a", "plan", plan), Row("A", "plan", plan)])
    for name in ("../a", "", "a b", "a/b", "." * 3):
        with pytest.raises(InputError, match="use letters, digits"):
            check_names([Row(name, "plan", plan)])


def test_component_prints_are_stable():
    assert component_prints(tiny_dit()) == component_prints(tiny_dit())
