"""LoRAs that no plan can add: one line says why, and the pipeline stays as it is."""

import json

import numpy as np
import pytest
import torch
from lora_cases import SETTING, images_of, loaded, random_lora, refused, saved
from safetensors.torch import load_file, save_file
from tiny import tiny_dit, tiny_sd3, tiny_stable_diffusion, tiny_unet

from fewstep.distill.export_lora import DIFFUSERS_FILE, PEFT_FILE, export_lora
from fewstep.samplers import LoraWeights, Plan, SpacingGrid
from fewstep.samplers.files import read_tensors, write_tensors


@pytest.fixture(scope="module")
def pipe():
    """For what is refused, which leaves it as it is."""
    return tiny_sd3()


def rewritten(change, path):
    tensors, header = read_tensors(path)
    write_tensors(path, change(tensors), header)


def with_metadata(path, **options):
    tensors, header = read_tensors(path)
    config = json.loads(header["lora_adapter_metadata"]) | {f"transformer.{k}": v for k, v in options.items()}
    write_tensors(path, tensors, header | {"lora_adapter_metadata": json.dumps(config)})


LAYER = "transformer.transformer_blocks.0.attn.to_q"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


def renamed(new):
    return lambda t: {(new if key == A else key): value for key, value in t.items()}


def put(key, value):
    return lambda t: t | {key: value}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed("lora_unet_attn_to_q.lora_down.weight"), "kohya's names of keys; load it with pipe.load_lora_weights"),
        (renamed("transformer.attn.to_q.lora.down.weight"), "names of keys of old versions of diffusers; load it with"),
        (
            put("text_encoder.q.lora_A.weight", torch.zeros(1)),
            "weights of a text encoder, which no plan changes; write",
        ),
        (put(f"{LAYER}.lora_magnitude_vector", torch.zeros(1)), "a DoRA, which is not a sum; merge it"),
        (put(f"{LAYER}.lokr_w1", torch.zeros(1)), "another kind of adapter; merge it"),
        (put(f"{LAYER}.lora_B.bias", torch.zeros(1)), "a LoRA with biases; train it with lora_bias=False"),
        (
            put("transformer.norm.weight", torch.zeros(1)),
            "has the key 'transformer.norm.weight'; keys are NETWORK.LAYER",
        ),
        (put("unet.x.lora_A.weight", torch.zeros(1)), "adapts transformer and unet; give a file for each network"),
        (lambda t: {k: v for k, v in t.items() if k != B}, "has no lora_B.weight of transformer_blocks.0.attn.to_q"),
        (
            lambda t: {k: v for k, v in t.items() if "to_q" not in k},
            "has no weights of its target 'transformer_blocks.0",
        ),
        (lambda t: {}, "adapts nothing"),
        (put(A, torch.full((3, 16), float("nan"))), f"{A} of {DIFFUSERS_FILE} is not finite"),
        (put(A, torch.zeros(2, 16)), "A (2, 16) and B (16, 3) of transformer_blocks.0.attn.to_q"),
        (put(A, torch.zeros(3, 8)), "has A (3, 8) and B (16, 3); a layer of (16, 16) takes (3, 16) and (16, 3)"),
        (lambda t: t | {A: torch.zeros(2, 16), B: torch.zeros(16, 2)}, "is of rank 2, and its config says 3"),
        (
            lambda t: t | {f"transformer.nowhere.lora_{side}.weight": torch.zeros(3, 3) for side in "AB"},
            "adapts 'nowhere', which the pipeline's SD3Transformer2DModel has not; it is for another network",
        ),
        (
            lambda t: t | {f"transformer.pos_embed.lora_{side}.weight": torch.zeros(3, 3) for side in "AB"},
            "pos_embed is a PatchEmbed; a LoRA of a plan adapts plain linear layers and convolutions",
        ),
    ],
)
def test_tensors_that_cannot_be_used(change, words, pipe, tmp_path):
    plan, files = saved(tmp_path, pipe)
    rewritten(change, files.paths[0])
    refused(pipe, plan, words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "was made with use_dora=True, which a plan cannot add; merge it into a student"),
        ({"bias": "all"}, "was made with bias='all'"),
        ({"modules_to_save": ["norm"]}, r"was made with modules_to_save=['norm']"),
        ({"something_new": 3}, "was made with something_new=3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the network too; convert it"),
        ({"lora_alpha": "x"}, "is 'x'; it must be a number"),
        ({"alpha_pattern": [3]}, "the alpha_pattern of pytorch_lora_weights.safetensors is [3]; it must be an object"),
        ({"rank_pattern": {"(a+)+": 3}}, "has the pattern '(a+)+'; write names of layers"),
    ],
)
def test_settings_that_are_no_plain_lora(options, words, pipe, tmp_path):
    plan, files = saved(tmp_path, pipe)
    with_metadata(files.paths[0], **options)
    refused(pipe, plan, words)


def test_headers_and_files_that_are_none(pipe, tmp_path):
    plan, files = saved(tmp_path, pipe)
    (path,) = files.paths
    tensors = load_file(path)
    for metadata, words in (("{", "is not valid JSON"), ("3", "is a int"), ("{}", "says nothing of 'transformer'")):
        save_file(tensors, path, metadata={"lora_adapter_metadata": metadata})
        refused(pipe, plan, f"the lora_adapter_metadata of {DIFFUSERS_FILE} {words}")
    path.write_bytes(b"nothing")
    refused(pipe, plan, "is corrupted")
    path.unlink()
    refused(pipe, plan, f"names {DIFFUSERS_FILE!r}, which is not in")
    refused(pipe, loaded(tmp_path, weights=LoraWeights(file="lora.bin")), "lora.bin looks like a pickle")
    refused(pipe, loaded(tmp_path, weights=LoraWeights(file="../lora.safetensors")), "outside the plan's folder")
    refused(pipe, loaded(tmp_path, weights=LoraWeights(file=".")), f"must hold either {DIFFUSERS_FILE} or {PEFT_FILE}")
    refused(pipe, Plan(weights=LoraWeights()), "load the plan with Plan.load(path)")


def test_configs_of_peft_that_do_not_fit(tmp_path):
    pipe = tiny_dit()
    plan, (path, config) = saved(tmp_path, pipe)[0], saved(tmp_path, pipe)[1].paths
    config.write_text(json.dumps({"peft_type": "LOHA"}))
    refused(pipe, plan, "adapter_config.json is not the config of a LoRA; its peft_type must be LORA")
    config.unlink()
    refused(pipe, plan, "names 'adapter_config.json', which is not in")
    path.rename(tmp_path / "other.safetensors")
    refused(pipe, loaded(tmp_path, weights=LoraWeights(file="other.safetensors")), f"keys of PEFT; name it {PEFT_FILE}")


def test_networks_that_no_lora_reaches(tmp_path):
    pipe = tiny_stable_diffusion()
    plan, _ = saved(tmp_path, pipe)
    pipe.fuse_qkv_projections()
    refused(pipe, plan, "which run instead of the layers of the LoRA; call pipe.unfuse_qkv_projections() first")
    pipe.unfuse_qkv_projections()
    conv = pipe.unet.mid_block.resnets[0].conv1
    conv.padding_mode = "circular"
    refused(pipe, plan, "mid_block.resnets.0.conv1 is a convolution of groups, dilated or padded otherwise")
    conv.padding_mode = "zeros"
    pipe.unet.mid_block.resnets[0].conv2 = conv
    refused(pipe, plan, "mid_block.resnets.0.conv2 twice, under two names of one layer")
    pipe = tiny_dit()
    plan, _ = saved(tmp_path / "dit", pipe)
    pipe.transformer.transformer_blocks[0].attn1.to_q.to(torch.float8_e4m3fn)
    refused(pipe, plan, "attn1.to_q has torch.float8_e4m3fn weights; load the network in a wider dtype")


def test_a_scale_that_adds_nothing_is_refused():
    with pytest.raises(ValueError, match="a scale of 0 adds nothing; leave the part out"):
        LoraWeights(scale=0)


def test_a_named_component_takes_a_file_of_another_name(tmp_path):
    pipe = tiny_unet()
    export_lora(pipe, "unet", random_lora(pipe.unet), tmp_path)
    two = SpacingGrid(steps=2)
    expected = images_of(pipe, loaded(tmp_path, weights=LoraWeights(file=PEFT_FILE), grid=two))
    tensors, _ = read_tensors(tmp_path / PEFT_FILE)
    config = {"x.r": SETTING.rank, "x.lora_alpha": SETTING.alpha}
    renamed = {key.replace("base_model.model", "x", 1): value for key, value in tensors.items()}
    write_tensors(tmp_path / "x.safetensors", renamed, {"lora_adapter_metadata": json.dumps(config)})
    part = LoraWeights(file="x.safetensors", component="unet")
    assert np.array_equal(images_of(pipe, loaded(tmp_path, weights=part, grid=two)), expected)
    refused(pipe, loaded(tmp_path, weights=LoraWeights(file="x.safetensors")), "unknown denoiser of the pipeline 'x'")
