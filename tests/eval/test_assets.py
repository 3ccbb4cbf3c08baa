import json

import pytest
import torch
from tiny import tiny_dit, tiny_unet

from fewstep.eval import assets
from fewstep.eval.conditions import Conditions, conditions_for, read_prompts
from fewstep.samplers import InputError


@pytest.fixture
def saved(tmp_path):
    tiny_unet().save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_loads_a_saved_pipeline_with_the_same_weights(saved):
    pipe = assets.load_pipeline(str(saved))
    expected = tiny_unet().unet.state_dict()
    assert type(pipe).__name__ == "DDIMPipeline"
    assert not pipe.unet.training
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_dtype_is_that_of_all_weights(saved):
    pipe = assets.load_pipeline(str(saved), dtype="bfloat16")
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}


def test_missing_folder_names_it_and_the_mend(tmp_path):
    with pytest.raises(InputError, match=r"--pipe .*nowhere is not a folder; give a diffusers pipeline folder"):
        assets.load_pipeline(str(tmp_path / "nowhere"))


def test_hub_names_are_not_fetched_unless_asked():
    with pytest.raises(InputError, match="allow the download"):
        assets.load_pipeline("some/repository")


def test_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(InputError, match=r"holds no model_index\.json"):
        assets.load_pipeline(str(tmp_path))


def test_pickled_weights_are_refused_by_name(saved):
    weights = saved / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match=r"pickled weights only \(diffusion_pytorch_model.bin\).*safe_serialization"):
        assets.load_pipeline(str(saved))


def test_damaged_pipeline_is_one_line(saved):
    (saved / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="cannot be loaded on cpu") as caught:
        assets.load_pipeline(str(saved))
    assert "\n" not in str(caught.value)


def test_index_that_is_not_json_is_one_line(saved):
    (saved / "model_index.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        assets.load_pipeline(str(saved))


def test_unknown_demo_is_told_the_known_ones():
    with pytest.raises(InputError, match="unknown demo 'demo:fashion-dti'"):
        assets.resolve_pipe("demo:fashion-dti")
    with pytest.raises(InputError, match="did you mean 'demo:tokens'"):
        assets.resolve_pipe("demo:token")
    with pytest.raises(InputError, match="demo:tokens holds token models and no pipeline; give it to fewstep bench"):
        assets.resolve_pipe("demo:tokens")


def test_shipped_plans_leave_the_reference_out(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "DEMO", tmp_path)
    folder = tmp_path / "plans" / "toy"
    folder.mkdir(parents=True)
    for name in ("reference", "b", "a"):
        plan = {"fewstep_plan": 1, "name": name, "grid": {"type": "spacing", "steps": 7}}
        (folder / f"{name}.json").write_text(json.dumps(plan))
    assert [path.stem for path in assets.shipped_plans("demo:toy")] == ["a", "b"]
    assert assets.reference_plan("demo:toy", 50).nominal_steps == 7
    assert assets.shipped_plans(str(tmp_path)) == []
    assert assets.reference_plan(str(tmp_path), 50).nominal_steps == 50


def test_condition_of_a_seed_does_not_depend_on_the_batch():
    conditions = Conditions("labels", tuple(range(10)))
    assert conditions.codes([3, 13, 29]) == [3, 3, 9]
    assert conditions.inputs([29, 3]) == {"class_labels": [9, 3]}
    prompts = Conditions("prompts", ("a", "b", "c"))
    assert prompts.codes([4, 5]) == [1, 2]
    assert prompts.inputs([4, 5]) == {"prompt": ["b", "c"]}
    assert Conditions("none").inputs([1, 2]) == {"batch_size": 2}


def test_conditions_that_do_not_fit_the_pipeline(tmp_path):
    with pytest.raises(InputError, match="DDIMPipeline takes no class labels"):
        conditions_for(tiny_unet(), class_labels=[1])
    with pytest.raises(InputError, match="names no labels; give them as --class_labels"):
        conditions_for(tiny_dit())
    with pytest.raises(InputError, match="takes no prompts"):
        conditions_for(tiny_dit(), class_labels=[1], prompts=tmp_path / "p.txt")


@pytest.mark.parametrize("label", [-1, 1001])
def test_labels_that_the_network_has_no_row_for(label):
    words = f"the network of DiTPipeline has a table of 1001 labels, 0 to 1000; got the label {label}"
    with pytest.raises(InputError, match=f"^{words}$"):
        conditions_for(tiny_dit(), class_labels=[3, label])
    assert conditions_for(tiny_dit(), class_labels=[0, 999, 1000]).values == (0, 999, 1000)


def test_labels_that_the_pipeline_names():
    pipe = tiny_dit()
    pipe.labels = {"shirt": 6, "bag": 8, "t-shirt": 0, "top": 0}
    assert conditions_for(pipe).values == (0, 6, 8)


def test_prompt_files(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert read_prompts(path) == ("a cat", "a dog")
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="give a text file in UTF-8"):
        read_prompts(path)
