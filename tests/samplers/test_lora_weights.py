"""LoRAs of a plan: what diffusers and PEFT give for the same file, bit for bit, and no trace of it."""

import threading
import warnings
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from lora_cases import images_of, loaded, modules_of, random_lora, saved, stock
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from tiny import call_arguments, tiny_dit, tiny_sd3, tiny_stable_diffusion
from zoo import ZOO

from fewstep.distill.export_lora import DIFFUSERS_FILE, PEFT_FILE
from fewstep.distill.lora import LoraSetting
from fewstep.samplers import (
    BlockMask,
    Escalate,
    Gate,
    HostCache,
    LoraWeights,
    ModelSwitch,
    Plan,
    PlanWarning,
    SpacingGrid,
    TunedFor,
    attach,
    doctor,
    fingerprint,
)


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
