"""What is loaded from the exported files is what was exported, to the last tensor and bit."""

import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_dit, tiny_sd3
from zoo import ZOO

from fewstep.distill.export_lora import DIFFUSERS_FILE, KOHYA_FILE, PEFT_FILE, export_lora
from fewstep.distill.lora import Lora, LoraSetting, adapter_parameters
from fewstep.distill.role_kinds import Adapter, Base
from fewstep.distill.roles import Roles
from fewstep.samplers.errors import InputError

SETTING = LoraSetting(rank=4, alpha=6.0)
FAMILIES = {
    "ddim": "peft",
    "stable-diffusion": "pipeline",
    "sdxl": "pipeline",
    "animatediff": "pipeline",
    "dit": "peft",
    "sd3": "pipeline",
    "flux": "pipeline",
    "amused": "network",
}
"What loads the adapter of some families of the zoo."


def trained(network, setting=SETTING):
    """Roles whose student is an adapter that does something."""
    roles = Roles(network, {"student": Adapter(setting), "teacher": Base()})
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in roles.trainable("student").values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    return roles


def load(pipe, files, folder):
    """Runs the line that the export says."""
    exec(f"{files.imports}\n{files.load.replace('FOLDER', str(folder))}", {"pipe": pipe})


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_libraries_load_every_tensor_of_every_family(name, tmp_path, caplog):
    made = ZOO[name]
    pipe, fresh = made.build(), made.build()
    roles = trained(getattr(pipe, made.denoiser))
    files = export_lora(pipe, made.denoiser, roles.lora("student"), tmp_path)
    assert all(path.parent == tmp_path and path.is_file() for path in files.paths)
    assert {"peft": "PeftModel", "pipeline": "pipe.load_lora_weights", "network": ".load_lora_adapter"}[
        FAMILIES[name]
    ] in files.load
    with caplog.at_level(logging.WARNING):
        load(fresh, files, tmp_path)
    assert not [
        record
        for record in caplog.records
        if " keys in the model" in record.message or "unexpected keys" in record.message
    ]

    network = getattr(fresh, made.denoiser)
    adapter = next(iter(network.peft_config))
    loaded = adapter_parameters(network, adapter)
    assert loaded.keys() == roles.lora("student").tensors.keys()
    assert all(torch.equal(loaded[key], value) for key, value in roles.lora("student").tensors.items())
    network.requires_grad_(False)  # torch multiplies weights that require gradients in another order
    with roles.use("student", grad=False, frozen=True):
        wanted = made.call(pipe)
    assert torch.equal(made.call(fresh), wanted)
    assert not torch.equal(made.call(pipe), wanted)


STOCK = """
import json, sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
for job in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(job["pipe"], **dict.fromkeys(job["missing"]))
    exec(job["load"])
    getattr(pipe, job["denoiser"]).requires_grad_(False)
    kwargs = load_file(job["tensors"]) | job["plain"] | {"num_inference_steps": 2}
    kwargs["generator"] = [torch.Generator().manual_seed(seed) for seed in range(2)]
    samples = next(iter(pipe(**kwargs).values()))
    save_file({"samples": torch.as_tensor(samples).contiguous()}, job["out"])
assert not [name for name in sys.modules if name.startswith("fewstep")]
"""


def test_a_program_without_fewstep_samples_as_the_student_does(tmp_path):
    jobs, wanted = [], []
    for name in ("stable-diffusion", "dit", "sd3", "flux"):
        made, folder = ZOO[name], tmp_path / name
        pipe = made.build()
        pipe.save_pretrained(folder / "pipe")
        roles = trained(getattr(pipe, made.denoiser))
        files = export_lora(pipe, made.denoiser, roles.lora("student"), folder / "lora")
        arguments = made.arguments(pipe, 2, 0)
        tensors = {key: value for key, value in arguments.items() if torch.is_tensor(value)}
        save_file(tensors, folder / "tensors")
        plain = {key: value for key, value in arguments.items() if key not in {*tensors, "generator"}}
        line = f"{files.imports}\n{files.load.replace('FOLDER', str(folder / 'lora'))}"
        paths = {part: str(folder / part) for part in ("pipe", "tensors", "out")}
        missing = [part for part, value in pipe.components.items() if value is None]
        jobs.append(paths | {"plain": plain, "load": line, "missing": missing, "denoiser": made.denoiser})
        with roles.use("student", grad=False, frozen=True):
            wanted.append(made.call(pipe))
    subprocess.run([sys.executable, "-c", STOCK, json.dumps(jobs)], check=True, cwd=tmp_path)
    for job, samples in zip(jobs, wanted, strict=True):
        assert torch.equal(load_file(job["out"])["samples"], samples)


@pytest.mark.parametrize(
    ("name", "targets"), [("stable-diffusion", ()), ("flux", ("attn.to_q", "attn.add_k_proj", "attn.to_out.0"))]
)
def test_kohya_keys_are_read_back_by_the_converters_of_diffusers(name, targets, tmp_path):
    # the converter of Flux knows no feed-forward layers
    made = ZOO[name]
    pipe, fresh = made.build(), made.build()
    roles = trained(getattr(pipe, made.denoiser), replace(SETTING, targets=targets))
    files = export_lora(pipe, made.denoiser, roles.lora("student"), tmp_path, kohya=True)
    assert files.paths[-1] == tmp_path / KOHYA_FILE
    fresh.load_lora_weights(tmp_path, weight_name=KOHYA_FILE)
    loaded = adapter_parameters(getattr(fresh, made.denoiser), "default_0")
    assert loaded.keys() == roles.lora("student").tensors.keys()
    with roles.use("student", grad=False, frozen=True):
        wanted = made.call(pipe)
    torch.testing.assert_close(made.call(fresh), wanted, rtol=1e-4, atol=1e-5)


def test_the_file_says_rank_alpha_and_layers(tmp_path):
    pipe = tiny_sd3()
    roles = trained(pipe.transformer, LoraSetting(2, 8.0, ("to_q", "attn.to_k")))
    export_lora(pipe, "transformer", roles.lora("student"), tmp_path, dtype=torch.float16)
    with safe_open(tmp_path / DIFFUSERS_FILE, "pt") as stream:
        config = json.loads(stream.metadata()["lora_adapter_metadata"])
    layers = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"]
    assert config == {"transformer.r": 2, "transformer.lora_alpha": 8.0, "transformer.target_modules": layers}
    tensors = load_file(tmp_path / DIFFUSERS_FILE)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert set(tensors) == {f"transformer.{layer}.lora_{part}.weight" for layer in layers for part in "AB"}


def test_a_merged_adapter_of_a_dit_is_a_dit(tmp_path):
    pipe, fresh = tiny_dit(), tiny_dit()
    roles = trained(pipe.transformer)
    files = export_lora(pipe, "transformer", roles.lora("student"), tmp_path)
    assert [path.name for path in files.paths] == [PEFT_FILE, "adapter_config.json"]
    fresh.transformer = PeftModel.from_pretrained(fresh.transformer, tmp_path).merge_and_unload()
    fresh.save_pretrained(tmp_path / "merged")
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    arguments = {"class_labels": [1, 2], "num_inference_steps": 2, "output_type": "np"}
    with roles.use("student", grad=False, frozen=True):
        wanted = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    made = merged(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert abs(made - wanted).max() < 1e-4


def test_bad_exports(tmp_path):
    pipe = tiny_dit()
    lora = trained(pipe.transformer).lora("student")
    with pytest.raises(InputError, match="no network 'unet' to export; its networks are transformer"):
        export_lora(pipe, "unet", lora, tmp_path)
    with pytest.raises(InputError, match="adapts no layer"):
        export_lora(pipe, "transformer", Lora(SETTING, {}), tmp_path)
    key = next(iter(lora.tensors))
    with pytest.raises(InputError, match=f"{key} of the LoRA is not finite; export an earlier checkpoint"):
        export_lora(pipe, "transformer", Lora(SETTING, lora.tensors | {key: torch.tensor([float("nan")])}), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        export_lora(pipe, "transformer", lora, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
