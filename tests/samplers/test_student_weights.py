"""Students of a plan: the pipeline that has them, and the pipeline's own network after it."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from lora_cases import images_of, loaded, random_lora, refused
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_model_switch import other_network, with_network
from tiny import TINY, call_arguments, tiny_dit, tiny_stable_diffusion, tiny_unet

from fewstep.distill.export_lora import PEFT_FILE, export_lora
from fewstep.samplers import (
    BlockMask,
    Escalate,
    InputError,
    LoraWeights,
    ModelSwitch,
    Plan,
    PlanWarning,
    SpacingGrid,
    StudentWeights,
    TunedFor,
    attach,
    denoisers,
    doctor,
    fingerprint,
)


def saved(folder, network, steps=3, **plan):
    network.save_pretrained(folder / "student")
    return loaded(folder, weights=StudentWeights(folder="student"), grid=SpacingGrid(steps=steps), **plan)


@pytest.mark.parametrize("name", TINY)
def test_outputs_are_those_of_the_pipeline_that_has_the_student(name, tmp_path):
    pipe = TINY[name]()
    component, own = next(iter(denoisers(pipe).items()))
    student = other_network(pipe)
    plan = saved(tmp_path, student, tuned_for=TunedFor(fingerprint=fingerprint(own)))
    plain, expected = (images_of(p, num_inference_steps=3) for p in (pipe, with_network(pipe, student)))
    before, config = dict(vars(pipe)), dict(pipe.config)
    with warnings.catch_warnings(action="error"), attach(pipe, plan) as handle:
        assert np.array_equal(pipe(**call_arguments(pipe)).images, expected)
        assert handle.stats.rows_by_network.keys() == {component}
    assert vars(pipe) == before
    assert dict(pipe.config) == config
    assert not np.array_equal(plain, expected)
    assert np.array_equal(images_of(pipe, num_inference_steps=3), plain)


def test_a_student_that_is_told_the_guidance_scale(tmp_path, monkeypatch):
    pipe, student = tiny_stable_diffusion(), tiny_stable_diffusion(time_cond_proj_dim=8).unet
    plan = saved(tmp_path, student)
    expected = images_of(with_network(pipe, student), num_inference_steps=3, guidance_scale=4.0)
    with attach(pipe, plan) as handle:
        assert np.array_equal(pipe(**call_arguments(pipe), guidance_scale=4.0).images, expected)
        assert {step.rows for step in handle.stats.steps} == {2}
        assert not np.array_equal(pipe(**call_arguments(pipe), guidance_scale=8.0).images, expected)
    images_of(pipe, num_inference_steps=1)
    monkeypatch.delattr(StableDiffusionPipeline, "get_guidance_scale_embedding")
    refused(
        pipe, plan, "told the guidance scale (time_cond_proj_dim=8), which StableDiffusionPipeline does not do; use"
    )


def test_other_parts_see_the_student_and_a_teacher_the_pipelines_own(tmp_path):
    """A cache that fits the student only, a switch back to the pipeline's own, and an escalation to it."""
    pipe, deep = tiny_dit(), tiny_dit(layers=3).transformer
    own = pipe.transformer
    masked = BlockMask(rows=("111111", "011011", "100100"), targets=("attention", "mlp"))
    plan = saved(tmp_path, deep, caches=masked)
    refused(pipe, plan.model_copy(update={"weights": ()}), "6 modules wide and DiTTransformer2DModel has 2")
    expected = images_of(with_network(pipe, deep), Plan(grid=SpacingGrid(steps=3), caches=masked))
    assert np.array_equal(images_of(pipe, plan), expected)

    switch = {"models": ModelSwitch(networks=("self", "own"), steps=(1,)), "caches": ()}
    with attach(pipe, plan.model_copy(update=switch), {"own": own}) as handle:
        pipe(**call_arguments(pipe))
    assert [step.network for step in handle.stats.steps] == ["transformer", "own", "own"]

    def none_pass(samples, conditions):
        return torch.zeros(len(samples))

    teacher = Escalate(teacher=Plan(grid=SpacingGrid(steps=3)).to_json(), strength=1.0, threshold=0.5)
    seen = []
    hook = own.register_forward_hook(lambda *_: seen.append(1))
    with attach(pipe, plan.model_copy(update={"models": teacher, "caches": ()}), {"scorer": none_pass}):
        pipe(**call_arguments(pipe))
    hook.remove()
    assert len(seen) == 3


def test_a_network_that_is_assigned_meanwhile_gives_way(tmp_path):
    pipe = tiny_dit()
    own = pipe.transformer
    with attach(pipe, saved(tmp_path, other_network(pipe))):
        assert pipe.transformer is not own
        pipe.transformer = other_network(pipe)
    assert pipe.transformer is own


def test_adapters_of_the_pipelines_own_network_stay_with_it(tmp_path):
    pipe = tiny_stable_diffusion()
    plan = saved(tmp_path, pipe.unet)
    expected = images_of(pipe, num_inference_steps=3)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.warns(PlanWarning, match="unet has adapters, which do not act on the student that runs instead of it"):
        assert np.array_equal(images_of(pipe, plan), expected)


def test_a_student_and_other_weights_of_one_network_are_refused(tmp_path):
    pipe = tiny_dit()
    plan = saved(tmp_path, pipe.transformer)
    export_lora(pipe, "transformer", random_lora(pipe.transformer), tmp_path)
    student, lora = StudentWeights(folder="student"), LoraWeights(file=PEFT_FILE)
    words = "another part of the weights changes; keep one of them"
    for weights in ((lora, student), (student, student)):
        refused(pipe, loaded(tmp_path, weights=weights), f"the student part replaces transformer, which {words}")
    refused(pipe, loaded(tmp_path, weights=(student, lora)), f"{PEFT_FILE} is for the pipeline's own; keep one of them")
    assert set(plan.file_digests()) == {"student/config.json", "student/diffusion_pytorch_model.safetensors"}
    (finding,) = [finding for finding in doctor(pipe, plan).findings if finding.subject == "weights: student"]
    count = len(pipe.transformer.state_dict())
    assert (finding.verdict, finding.text) == ("runs", f"student runs instead of transformer: {count} tensors")


def test_students_that_do_not_fit(tmp_path):
    pipe = tiny_dit()
    plan = saved(tmp_path, pipe.transformer)
    refused(pipe, Plan(weights=StudentWeights()), "the student part reads 'transformer/config.json' beside the plan")
    refused(pipe, loaded(tmp_path, weights=StudentWeights(folder="x")), "names 'x/config.json', which is not in")
    refused(pipe, loaded(tmp_path, weights=StudentWeights(component="unet")), "unknown denoiser of the pipeline 'unet'")
    refused(tiny_unet(), plan, "holds a DiTTransformer2DModel, and the pipeline runs a UNet2DModel; give one of those")
    wide = type(pipe.transformer).from_config(pipe.transformer.config, num_embeds_ada_norm=500)
    refused(
        pipe, saved(tmp_path / "wide", wide), "network 'student' has num_embeds_ada_norm=500 and the pipeline's own"
    )
    pipe.transformer.transformer_blocks[0]._hf_hook = object()
    refused(
        pipe, plan, "transformer is offloaded, which would move to the student; attach the plan to a pipeline without"
    )


@pytest.mark.parametrize(("extra", "words"), [(True, "has 1 tensors that a"), (False, "lacks 1 tensors, such as")])
def test_every_tensor_is_used_and_none_is_missing(extra, words, tmp_path):
    pipe = tiny_dit()
    plan = saved(tmp_path, pipe.transformer)
    path = tmp_path / "student" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    if extra:
        tensors["other"] = torch.zeros(1)
    else:
        del tensors["proj_out_2.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=words):
        attach(pipe, plan)
