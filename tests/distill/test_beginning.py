"""A student that begins where another one ended."""

import json

import pytest
import torch
from small_runs import roles_in

from fewstep.samplers.errors import InputError
from fewstep.samplers.files import read_tensors

FULL = "transformer/diffusion_pytorch_model.safetensors"
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(given_files, tmp_path_factory):
    """Folders of a student with all weights, and of an adapter of rank 2 and alpha 4."""
    full, adapter = tmp_path_factory.mktemp("full"), tmp_path_factory.mktemp("adapter")
    given_files.run("lcm", full, {"grid_steps": 8}, 2, train_data_dir=given_files.images)
    given_files.run(
        "lcm-lora", adapter, {"grid_steps": 8}, 2, train_data_dir=given_files.images, lora_rank=2, lora_alpha=4.0
    )
    return full, adapter


def standing(given, folder, name, hyper, **changes):
    """Roles after one update that changes nothing, since its learning rate is next to none."""
    given.run(name, folder, hyper, 1, learning_rate=1e-30, train_data_dir=given.images, **changes)
    return roles_in(folder / "checkpoint-1")


def test_all_weights_go_on_and_so_does_their_average_and_the_teacher_does_not(given, trained, tmp_path):
    mine, _ = read_tensors(trained[0] / FULL)
    teacher, _ = read_tensors(given.pipe / FULL)
    hyper = {"fake_updates": 1, "student_steps": 2}
    found = standing(given, tmp_path, "dmd2", hyper, student=trained[0] / "plan.json", use_ema=True)
    for name, tensor in mine.items():
        torch.testing.assert_close(found[f"student/{name}"], tensor, rtol=0, atol=0)
        torch.testing.assert_close(found[f"average/{name}"], tensor, rtol=0, atol=0)
        torch.testing.assert_close(found[f"fake/{name}"], teacher[name], rtol=0, atol=0)
    assert any(not torch.equal(tensor, teacher[name]) for name, tensor in mine.items())


def test_an_adapter_goes_on_at_another_alpha(given, trained, tmp_path):
    hyper = {"grid_steps": 8}
    found = standing(given, tmp_path, "tcd", hyper, student=trained[1] / "plan.json", lora_rank=2, lora_alpha=8.0)
    before, _ = read_tensors(trained[1] / ADAPTER)
    assert any(tensor.any() for name, tensor in before.items() if "lora_B" in name)
    for name, tensor in before.items():
        mine = found[f"student/{name.removeprefix('base_model.model.')}"]
        torch.testing.assert_close(mine * (2.0 if "lora_B" in name else 1.0), tensor, rtol=1e-6, atol=0)


def test_a_run_resumes_with_the_same_beginning_only(given, trained, tmp_path):
    hyper, images = {"grid_steps": 8}, given.images
    first = trained[0] / "plan.json"
    given.run("lcm", tmp_path / "whole", hyper, 3, train_data_dir=images, student=first)
    given.run("lcm", tmp_path / "parts", hyper, 2, train_data_dir=images, student=first)
    given.run(
        "lcm", tmp_path / "parts", hyper, 3, train_data_dir=images, student=first, resume_from_checkpoint="latest"
    )
    assert (tmp_path / "whole" / FULL).read_bytes() == (tmp_path / "parts" / FULL).read_bytes()
    card = (tmp_path / "whole" / "README.md").read_text()
    assert f"* Began with the weights of: {first}" in card
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["student"] == str(first)
    with pytest.raises(InputError, match=r"was written with student = .*, this run has None"):
        given.run("lcm", tmp_path / "parts", hyper, 4, train_data_dir=images, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    ("name", "which", "changes", "told"),
    [
        ("lcm", 1, {}, "is an adapter, and this student has all weights; give its --lora_rank"),
        ("lcm", 0, {"lora_rank": 2}, "has all weights, and this one is an adapter; give --lora_rank 0"),
        ("lcm", 1, {"lora_rank": 4}, "as (2, 16), and this student as (4, 16); give one of the same network"),
        ("icd", 1, {"lora_rank": 2}, "icd trains 2 students at once; leave --student out"),
        ("lcm", None, {}, "has 0 parts of weights; give the plan of one student"),
    ],
)
def test_what_cannot_be_begun_with_is_refused(name, which, changes, told, given, trained, tmp_path):
    path = given.teacher if which is None else trained[which] / "plan.json"
    hyper = {"grid_steps": 8}
    with pytest.raises(InputError) as error:
        given.run(name, tmp_path, hyper, student=path, train_data_dir=given.images, **changes)
    assert told in str(error.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_another_network_is_refused(given, trained, tmp_path):
    folder = tmp_path / "other"
    (folder / "transformer").mkdir(parents=True)
    config = json.loads((trained[0] / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps(config | {"num_layers": config["num_layers"] + 1}))
    (folder / FULL).write_bytes((trained[0] / FULL).read_bytes())
    (folder / "plan.json").write_bytes((trained[0] / "plan.json").read_bytes())
    with pytest.raises(InputError, match=r"lacks .* tensors"):
        given.run("lcm", tmp_path / "out", {"grid_steps": 8}, student=folder / "plan.json", train_data_dir=given.images)
