"""LoRAs of a plan: what diffusers and PEFT give for the same file, bit for bit, and no trace of it."""

import json
import threading
import warnings
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import call_arguments, tiny_dit, tiny_sd3, tiny_stable_diffusion, tiny_unet
from zoo import ZOO

from fewstep.distill.export_lora import DIFFUSERS_FILE, PEFT_FILE, export_lora
from fewstep.distill.lora import Lora, LoraSetting, adapted_layers
from fewstep.samplers import (
    BlockMask,
    Escalate,
    Gate,
    HostCache,
    InputError,
    LoraWeights,
    ModelSwitch,
    Plan,
    PlanWarning,
    SpacingGrid,
    TunedFor,
    attach,
    denoisers,
    doctor,
    fingerprint,
)
from fewstep.samplers.files import read_tensors, write_tensors

SETTING = LoraSetting(rank=3, alpha=5.0)


def random_lora(network, setting=SETTING, seed=3):
    """A LoRA that changes much."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for name in adapted_layers(network, setting):
        weight = network.get_submodule(name).weight
        shapes = {
            "A": (setting.rank, *weight.shape[1:]),
            "B": (len(weight), setting.rank, *(1,) * (weight.ndim - 2)),
        }
        for side, shape in shapes.items():
            tensors[f"{name}.lora_{side}.weight"] = 0.2 * torch.randn(shape, generator=draw)
    return Lora(setting, tensors)


def saved(folder, pipe, setting=SETTING, seed=3, steps=3, **plan):
    """A plan whose LoRA is beside it, and what else stands there."""
    component, network = next(iter(denoisers(pipe).items()))
    files = export_lora(pipe, component, random_lora(network, setting, seed), folder)
    part = LoraWeights(file=files.paths[0].name)
    return loaded(folder, weights=part, grid=SpacingGrid(steps=steps), **plan), files


def loaded(folder, **fields):
    Plan(**fields).save(folder / "plan.json")
    return Plan.load(folder / "plan.json")


def stock(pipe, files, folder):
    """The pipeline once the line of the export has loaded the files."""
    exec(f"{files.imports}\n{files.load.replace('FOLDER', str(folder))}", {"pipe": pipe})
    next(iter(denoisers(pipe).values())).requires_grad_(False)  # torch multiplies those that do in another order
    return pipe


def images_of(pipe, plan=None, **arguments):
    arguments = call_arguments(pipe) | arguments
    if plan is None:
        return pipe(**arguments).images
    with attach(pipe, plan):
        return pipe(**arguments).images


def modules_of(pipe):
    """All that a module of the denoiser is, apart from the values of its tensors."""
    network = next(iter(denoisers(pipe).values()))
    return [(name, type(module), len(module._forward_hooks)) for name, module in network.named_modules()]


@pytest.mark.parametrize("name", ["stable-diffusion", "ddim", "dit", "sd3", "flux"])
def test_outputs_are_those_of_the_libraries_that_load_the_file(name, tmp_path):
    made = ZOO[name]
    pipe = made.build()
    plan, files = saved(tmp_path, pipe)
    getattr(pipe, made.denoiser).requires_grad_(False)
    plan = plan.model_copy(update={"grid": None})
    before, values, plain = modules_of(pipe), fingerprint(getattr(pipe, made.denoiser)), made.call(pipe)
    with attach(pipe, plan):
        found = made.call(pipe)
        assert modules_of(pipe) == before
    assert modules_of(pipe) == before
    assert fingerprint(getattr(pipe, made.denoiser)) == values
    assert torch.equal(made.call(pipe), plain)
    assert torch.equal(found, made.call(stock(made.build(), files, tmp_path)))
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_in_half_precision_are_those_of_diffusers(dtype, tmp_path):
    pipe, other = tiny_sd3(), tiny_sd3()
    plan, files = saved(tmp_path, pipe)
    for each in (pipe, other):
        each.to(dtype).transformer.requires_grad_(False)
    stock(other, files, tmp_path)
    prompts = {k: v.to(dtype) for k, v in call_arguments(pipe).items() if torch.is_tensor(v)} | {"output_type": "pt"}
    plain = images_of(pipe, num_inference_steps=3, **prompts)
    found = images_of(pipe, plan, **prompts)
    assert torch.equal(found, images_of(other, num_inference_steps=3, **prompts))
    assert not torch.equal(found, plain)


PATTERNS = {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 7, "attn1.to_q": 1}}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, PATTERNS])
@pytest.mark.parametrize("metadata", [True, False])
def test_files_that_diffusers_writes(options, metadata, tmp_path):
    """With ranks and alphas of their own, also without the header, where every alpha is the rank."""
    trained, pipe, other = tiny_stable_diffusion(), tiny_stable_diffusion(), tiny_stable_diffusion()
    config = LoraConfig(r=4, lora_alpha=3, target_modules=["to_q", "to_k", "conv1"], **options)
    trained.unet.add_adapter(config)
    with torch.no_grad():
        for name, parameter in trained.unet.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    header = {"unet_lora_adapter_metadata": trained.unet.peft_config["default"].to_dict()} if metadata else {}
    trained.save_lora_weights(tmp_path, get_peft_model_state_dict(trained.unet, adapter_name="default"), **header)
    other.load_lora_weights(tmp_path, weight_name=DIFFUSERS_FILE)
    other.unet.requires_grad_(False)
    plan = loaded(tmp_path, weights=LoraWeights(), grid=SpacingGrid(steps=2))
    assert np.array_equal(images_of(pipe, plan), images_of(other, num_inference_steps=2))


def test_several_with_scales_are_the_adapters_of_diffusers(tmp_path):
    """In the order of the plan; on top of one that is loaded already; and in another order up to rounding."""
    pipe, other = tiny_sd3(), tiny_sd3()
    for name, seed in (("a", 1), ("b", 2)):
        saved(tmp_path / name, pipe, seed=seed)
        other.load_lora_weights(tmp_path / name, adapter_name=name)
    other.set_adapters(["a", "b"], [0.5, -2.0])
    other.transformer.requires_grad_(False)
    expected = images_of(other, num_inference_steps=2)
    a, b = LoraWeights(file="a", scale=0.5), LoraWeights(file=f"b/{DIFFUSERS_FILE}", scale=-2.0)
    plan = partial(loaded, tmp_path, grid=SpacingGrid(steps=2))
    assert np.array_equal(images_of(pipe, plan(weights=(a, b))), expected)
    np.testing.assert_allclose(images_of(pipe, plan(weights=(b, a))), expected, atol=1e-4)
    pipe.load_lora_weights(tmp_path / "a", adapter_name="a")
    pipe.set_adapters(["a"], [0.5])
    pipe.transformer.requires_grad_(False)
    assert np.array_equal(images_of(pipe, plan(weights=b)), expected)
    assert not np.array_equal(images_of(pipe, num_inference_steps=2), expected)


HOST = {
    "cache_interval": 2,
    "disable_cache_before_step": 1,
    "cache_identifiers": [r"transformer_blocks[.][0-9]+[.]attn1[.]to_q"],
}


@pytest.mark.parametrize(
    "cache",
    [
        BlockMask(rows=("111111", "011011", "100100"), targets=("attention", "mlp")),
        Gate(threshold=2.0, max_skips=2),
        HostCache(config="TaylorSeerCacheConfig", options=HOST | {"taylor_factors_dtype": "float32"}),
    ],
    ids=lambda part: part.type,
)
def test_caches_keep_what_the_layers_give_with_it(cache, tmp_path):
    """Also where a cache decides about an adapted layer itself."""
    build = partial(tiny_dit, layers=3)
    pipe = build()
    plan, _ = saved(tmp_path, pipe, caches=cache)
    other = build()
    PeftModel.from_pretrained(other.transformer, tmp_path)
    expected = images_of(other, plan.model_copy(update={"weights": ()}))
    assert np.array_equal(images_of(pipe, plan), expected)
    assert not np.array_equal(images_of(pipe, plan.model_copy(update={"caches": ()})), expected)


def test_a_switch_adapts_the_steps_of_the_pipelines_own_network(tmp_path):
    """Also where the network that takes over is the same one, bare; by hand the adapter is switched off there."""
    pipe, other = tiny_stable_diffusion(), tiny_stable_diffusion()
    plan, files = saved(tmp_path, pipe, steps=4, models=ModelSwitch(networks=("self", "bare"), steps=(2,)))
    stock(other, files, tmp_path)

    def switch(pipe, step, timestep, kwargs):
        if step == 1:
            pipe.unet.disable_lora()
        return kwargs

    expected = images_of(other, num_inference_steps=4, callback_on_step_end=switch)
    with attach(pipe, plan, {"bare": pipe.unet}) as handle:
        assert np.array_equal(pipe(**call_arguments(pipe)).images, expected)
    assert handle.stats.rows_by_network == {"unet": 8, "bare": 8}


def test_pipelines_in_two_threads_share_a_network_with_other_weights(tmp_path):
    first = tiny_dit()
    second, third = (type(first)(**first.components) for _ in range(2))
    pipes = [first, second, third]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    plans = [saved(tmp_path / str(seed), first, seed=seed, steps=12)[0] for seed in (1, 2)]
    plans.append(Plan(grid=SpacingGrid(steps=12)))
    alone = [images_of(pipe, plan) for pipe, plan in zip(pipes, plans, strict=True)]
    assert not any(np.array_equal(a, b) for a, b in pairwise(alone))
    together, gate = {}, threading.Barrier(3)

    def work(index):
        gate.wait()
        together[index] = [images_of(pipes[index], plans[index]) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        assert all(np.array_equal(images, expected) for images in together[index])


def test_a_call_that_raises_leaves_nothing_behind(tmp_path):
    pipe = tiny_stable_diffusion()
    plan, _ = saved(tmp_path, pipe)
    before, plain = modules_of(pipe), images_of(pipe, num_inference_steps=3)
    expected = images_of(pipe, plan)

    def stop(pipe, step, timestep, kwargs):
        raise KeyboardInterrupt

    with attach(pipe, plan):
        with pytest.raises(KeyboardInterrupt):
            pipe(**call_arguments(pipe), callback_on_step_end=stop)
        assert modules_of(pipe) == before
        assert np.array_equal(pipe(**call_arguments(pipe)).images, expected)
    assert np.array_equal(images_of(pipe, num_inference_steps=3), plain)


def test_the_weights_follow_their_layer_to_another_device(tmp_path):
    pipe = tiny_dit()
    plan, _ = saved(tmp_path, pipe)
    name = next(iter(random_lora(pipe.transformer).layers))
    with attach(pipe, plan) as handle:
        (addition,) = handle._run.additions["transformer"][pipe.transformer.get_submodule(name)]
        for device in ("cpu", "meta"):
            output, x = torch.zeros(2, 16, device=device), torch.ones(2, 16)
            assert addition(output, x).device == torch.device(device)


def test_a_network_that_is_compiled_runs_with_it_and_the_plan_says_what_it_costs(tmp_path):
    pipe = tiny_dit()
    plan, _ = saved(tmp_path, pipe, LoraSetting(2, 2.0, ("ff.net.2",)), steps=2)
    expected, plain = images_of(pipe, plan), images_of(pipe, num_inference_steps=2)
    pipe.transformer.transformer_blocks[0].ff.compile(backend="eager")
    for _ in range(2):
        with pytest.warns(PlanWarning, match="transformer is compiled: its graph breaks at each of the 1 layers"):
            assert np.array_equal(images_of(pipe, plan), expected)
        assert np.array_equal(images_of(pipe, num_inference_steps=2), plain)


def test_the_plan_knows_its_files_and_the_base_that_it_is_for(tmp_path):
    pipe = tiny_dit()
    plan, _ = saved(tmp_path, pipe)
    assert set(plan.file_digests()) == {PEFT_FILE, "adapter_config.json"}
    for part in (LoraWeights(file="."), LoraWeights(file=f"../{tmp_path.name}")):
        with attach(pipe, loaded(tmp_path, weights=part)):
            pass
    tuned = plan.model_copy(update={"tuned_for": TunedFor(fingerprint=fingerprint(pipe.transformer))})
    with warnings.catch_warnings(action="error"), attach(pipe, tuned) as handle:
        assert handle.warnings == ()
    teacher = Escalate(teacher=plan, strength=1.0, threshold=0.5)
    assert loaded(tmp_path, models=teacher).file_digests() == plan.file_digests()
    (finding,) = [finding for finding in doctor(pipe, plan).findings if finding.subject == "weights: lora"]
    assert (finding.verdict, finding.text) == ("runs", "adapts 6 layers of transformer with 12 tensors")


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


def refused(pipe, plan, words):
    before, state = dict(vars(pipe)), modules_of(pipe)
    with pytest.raises(InputError) as caught:
        attach(pipe, plan)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert vars(pipe) == before
    assert modules_of(pipe) == state


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
