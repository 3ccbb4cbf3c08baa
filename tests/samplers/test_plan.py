"""Plans as data: round trips, the schema, and the words of the errors."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from fewstep.samplers import (
    ConstantGuidance,
    DiffusersSolver,
    Evidence,
    ExplicitGrid,
    InputError,
    Plan,
    SpacingGrid,
    TunedFor,
)

FULL = Plan(
    name="five",
    solver=DiffusersSolver(scheduler="DDIMScheduler", config={"clip_sample": False}),
    grid=ExplicitGrid(timesteps=(999, 700.5, 300, 20)),
    guidance=ConstantGuidance(scale=1.5),
    tuned_for=TunedFor(pipeline="DiTPipeline", steps=4),
    evidence=(Evidence(metric="fd_fashion", value=3.0, se=0.1, n=10_000, seeds=(0, 10_000)),),
)


@pytest.mark.parametrize("plan", [Plan(), FULL, Plan(grid=SpacingGrid(steps=5, spacing="trailing"))])
def test_json_round_trip(tmp_path, plan):
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["fewstep_plan"] == 1


def test_parts_come_in_the_order_of_the_fields():
    assert [part.type for part in FULL.parts] == ["diffusers", "explicit", "constant"]
    assert FULL.nominal_steps == 4
    assert Plan().nominal_steps is None


def test_plans_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        FULL.name = "other"


def test_the_schema_that_ships_is_the_schema_of_the_code():
    path = Path(__file__).parents[2] / "samplers" / "plan.schema.json"
    assert json.loads(path.read_text()) == Plan.model_json_schema()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"grid": {"type": "explicit", "timesteps": [3, 7]}},
            "timesteps must decrease; got 3 before 7 at index 1",
        ),
        ({"grid": {"type": "explicit", "timesteps": [7, 7]}}, "timesteps must not repeat; got 7 twice"),
        ({"grid": {"type": "explicit", "timesteps": []}}, "at least 1 item"),
        ({"grid": {"type": "explicit", "timesteps": [None]}}, "valid number"),
        ({"grid": {"type": "spacing", "steps": 0}}, "greater than or equal to 1; got 0"),
        ({"grid": {"type": "spacings", "steps": 4}}, "unknown grid type 'spacings'; did you mean 'spacing'"),
        ({"grid": {"steps": 4}}, "a grid type is an object with a 'type'"),
        ({"grid": {"type": "spacing", "steps": 4, "stpes": 5}}, "Extra inputs are not permitted; got 5"),
        ({"guidance": {"type": "constant", "scale": -1}}, "greater than or equal to 0; got -1"),
        ({"gird": {}}, "unknown part 'gird'; did you mean 'grid'"),
        ({"fewstep_plan": 2}, "has plan version 2; this fewstep reads version 1"),
    ],
)
def test_bad_plans_say_what_is_wrong_in_one_line(tmp_path, change, words):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"fewstep_plan": 1} | change))
    with pytest.raises(InputError) as caught:
        Plan.load(path)
    assert words in str(caught.value)
    assert "bad.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("{", "not valid JSON"), ("[]", "not a fewstep plan"), ("{}", "not a fewstep plan")]
)
def test_files_that_are_no_plans(tmp_path, text, words):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match=words):
        Plan.load(tmp_path / "bad.json")


def test_a_missing_file_and_a_pickle(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="pickle"):
        Plan.load(tmp_path / "plan.pkl")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    FULL.save(path)
    before = path.read_text()
    monkeypatch.setattr(
        Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(InputError, match=r"cannot write .*plan\.json: No space left"):
        Plan().save(path)
    monkeypatch.undo()
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
