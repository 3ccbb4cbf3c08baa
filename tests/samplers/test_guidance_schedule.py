"""Guidance over the steps: right on every pipeline that guides by two branches, and cheaper where it is off."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from pydantic import ValidationError
from tiny import call_arguments, tiny_dit, tiny_qwen, tiny_sd3, tiny_stable_diffusion, tiny_unet, tiny_wan

from fewstep.samplers import (
    ConstantGuidance,
    DiffusersSolver,
    ExplicitGrid,
    GuidanceSchedule,
    InputError,
    Plan,
    SpacingGrid,
    attach,
)

GUIDED = {
    "dit": tiny_dit,
    "stable-diffusion": tiny_stable_diffusion,
    "sd3": tiny_sd3,
    "wan": tiny_wan,
    "qwen": tiny_qwen,
}
STACKED = ("dit", "stable-diffusion", "sd3")
SCALES = (3.0, 1.0, 2.0, 5.0, 1.0)


def images_of(pipe, plan, batch=2, **arguments):
    with attach(pipe, plan) as handle:
        output = pipe(**call_arguments(pipe, batch) | arguments)
    images = next(iter(vars(output).values()))
    return (images.numpy() if isinstance(images, torch.Tensor) else np.asarray(images)), handle.stats


def plan_of(scale, steps=5, **options):
    return Plan(grid=SpacingGrid(steps=steps), guidance=GuidanceSchedule(scale=scale, **options))


@pytest.mark.parametrize("name", GUIDED)
def test_one_scale_for_all_steps_is_the_pipelines_own_guidance_bit_for_bit(name):
    pipe = GUIDED[name]()
    plain = pipe(**call_arguments(pipe), num_inference_steps=5, **own_scale(pipe, 3.0))
    images, stats = images_of(pipe, plan_of(3.0))
    assert np.array_equal(images, np.asarray(next(iter(vars(plain).values()))))
    assert stats.nfe == 10


def own_scale(pipe, scale):
    return {"true_cfg_scale" if "Qwen" in type(pipe).__name__ else "guidance_scale": scale}


def by_hand_stable_diffusion(pipe, scales):
    """The loop of a guided sampler, written out: both branches in each step, one scale for each."""
    given = call_arguments(pipe)
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in given["generator"]])
    pipe.scheduler.set_timesteps(len(scales))
    for t, scale in zip(pipe.scheduler.timesteps, scales, strict=True):
        cond = pipe.unet(x, t, given["prompt_embeds"]).sample
        uncond = pipe.unet(x, t, given["negative_prompt_embeds"]).sample
        x = pipe.scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
    return x


def by_hand_dit(pipe, scales):
    given = call_arguments(pipe)
    x = torch.cat([torch.randn(1, 4, 4, 4, generator=g) for g in given["generator"]])
    pipe.scheduler.set_timesteps(len(scales))
    labels = torch.tensor(given["class_labels"])
    for t, scale in zip(pipe.scheduler.timesteps, scales, strict=True):
        cond = pipe.transformer(x, t.expand(2), class_labels=labels).sample
        uncond = pipe.transformer(x, t.expand(2), class_labels=torch.full_like(labels, 1000)).sample
        x = pipe.scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
    return pipe.vae.decode(x).sample.div(2).add(0.5).clamp(0, 1).permute(0, 2, 3, 1)


def by_hand_wan(pipe, scales):
    given = call_arguments(pipe)
    x = torch.cat([torch.randn(1, 16, 1, 2, 2, generator=g) for g in given["generator"]])
    pipe.scheduler.set_timesteps(len(scales))
    for t, scale in zip(pipe.scheduler.timesteps, scales, strict=True):
        cond = pipe.transformer(x, t.expand(2), given["prompt_embeds"]).sample
        uncond = pipe.transformer(x, t.expand(2), given["negative_prompt_embeds"]).sample
        x = pipe.scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
    return x


@pytest.mark.parametrize("scales", [SCALES, (1.0, 4.0, 4.0, 1.0, 2.0)], ids=["first-on", "first-off"])
@pytest.mark.parametrize(
    ("name", "by_hand"), [("stable-diffusion", by_hand_stable_diffusion), ("dit", by_hand_dit), ("wan", by_hand_wan)]
)
@torch.no_grad()
def test_a_scale_for_each_step_is_the_loop_written_out(name, by_hand, scales):
    pipe = GUIDED[name]()
    expected = by_hand(pipe, scales)
    latent = {"output_type": "latent"} if name == "stable-diffusion" else {}
    images, stats = images_of(pipe, plan_of(scales), **latent)
    np.testing.assert_allclose(images, expected, atol=2e-5)
    learning = 1 if scales[0] == 1 else 0
    assert stats.nfe == sum(2 if scale > 1 else 1 for scale in scales) + learning


@pytest.mark.parametrize("name", GUIDED)
def test_the_window_saves_the_unconditional_pass(name):
    """And the result is that of the same scales with every branch computed."""
    pipe = GUIDED[name]()
    images, stats = images_of(pipe, plan_of(4.0, window=(0.0, 0.5), steps=6))
    listed, _ = images_of(pipe, plan_of((4.0, 4.0, 4.0, 1.0, 1.0, 1.0), steps=6))
    assert np.array_equal(images, listed)
    assert stats.nfe == 3 * 2 + 3
    rows = [step.rows for step in stats.steps]
    assert rows == [4, 4, 4, 2, 2, 2]
    evaluations = [step.evaluations for step in stats.steps]
    assert evaluations == ([1] * 6 if name in STACKED else [2, 2, 2, 1, 1, 1])
    full, _ = images_of(pipe, plan_of(4.0, steps=6))
    assert np.abs(full - images).max() > 1e-4


@pytest.mark.parametrize("name", ["dit", "wan"])
def test_off_from_the_second_step_on_is_the_pipeline_without_guidance_from_there(name):
    """A scale just above 1 in the first step, and nothing else, is next to no guidance at all."""
    pipe = GUIDED[name]()
    unguided = pipe(**call_arguments(pipe), num_inference_steps=5, **own_scale(pipe, 1.0))
    images, stats = images_of(pipe, plan_of((1.0001, 1, 1, 1, 1)))
    np.testing.assert_allclose(images, np.asarray(next(iter(vars(unguided).values()))), atol=1e-3)
    assert stats.nfe == 6


def test_rescale_is_the_pipelines_own():
    pipe = tiny_stable_diffusion()
    expected = pipe(**call_arguments(pipe), num_inference_steps=4, guidance_scale=6.0, guidance_rescale=0.7).images
    images, _ = images_of(pipe, plan_of(6.0, steps=4, rescale=0.7))
    assert np.array_equal(images, expected)
    with pytest.raises(InputError, match="DiTPipeline takes no argument 'guidance_rescale'; remove the guidance part"):
        attach(tiny_dit(), plan_of(6.0, rescale=0.7))


def test_a_batch_is_the_stack_of_single_runs():
    pipe = tiny_dit()
    together, _ = images_of(pipe, plan_of(SCALES), batch=3)
    for index in range(3):
        arguments = call_arguments(pipe, 1, seed=index) | {"class_labels": [index]}
        alone, _ = images_of(pipe, plan_of(SCALES), **arguments)
        np.testing.assert_allclose(alone[0], together[index], atol=2e-5)


def test_with_a_solver_that_keeps_another_state_and_an_uneven_grid():
    pipe = tiny_dit()
    plans = {
        name: Plan(
            solver=DiffusersSolver(scheduler=name),
            grid=ExplicitGrid(timesteps=(990, 700.5, 431, 102, 14)),
            guidance=GuidanceSchedule(scale=SCALES),
        )
        for name in ("DDIMScheduler", "EulerDiscreteScheduler")
    }
    images = [images_of(pipe, plan)[0] for plan in plans.values()]
    np.testing.assert_allclose(images[0], images[1], atol=2e-4)


def test_equal_branches_are_told_apart_as_soon_as_they_differ():
    """A network that ignores its condition in the first step."""
    pipe = tiny_dit()
    embedding = pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    with torch.no_grad():
        embedding.copy_(embedding[:1].expand_as(embedding))
    images, stats = images_of(pipe, plan_of((3.0, 1.0, 1.0), steps=3))
    unguided = pipe(**call_arguments(pipe), num_inference_steps=3, guidance_scale=1.0).images
    np.testing.assert_allclose(images, unguided, atol=2e-5)
    assert stats.nfe == 6, "nothing could be left out without knowing which is which"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 1.0}, "no scale above 1 means no guidance; got 1"),
        ({"scale": (2.0, 0.5)}, "scales are at least 1, which is off; got 0.5"),
        ({"scale": 2.0, "window": (0.5, 0.5)}, "a window is a pair 0 <= start < stop <= 1; got"),
        ({"scale": 2.0, "rescale": 1.5}, "less than or equal to 1"),
    ],
)
def test_bad_values(options, words):
    with pytest.raises(ValidationError, match=words):
        GuidanceSchedule(**options)


def test_refusals():
    with pytest.raises(InputError, match="the guidance part lists 2 scales and the plan has 5 steps; give one scale"):
        attach(tiny_dit(), plan_of((2.0, 1.0)))
    with pytest.raises(InputError, match="the guidance part lists 2 scales and the plan has no grid"):
        attach(tiny_dit(), Plan(guidance=GuidanceSchedule(scale=(2.0, 1.0))))
    with pytest.raises(InputError, match="DDIMPipeline takes no argument 'guidance_scale'; remove the guidance part"):
        attach(tiny_unet(), plan_of(2.0))
    heun = Plan(
        solver=DiffusersSolver(scheduler="HeunDiscreteScheduler"),
        grid=SpacingGrid(steps=3),
        guidance=GuidanceSchedule(scale=(2.0, 1.0, 1.0)),
    )
    with pytest.raises(InputError, match="lists 3 scales and the scheduler takes 5 steps; solvers with two"):
        images_of(tiny_dit(), heun)


def test_no_two_branches_is_an_error_and_not_an_unguided_image():
    pipe = tiny_qwen()
    arguments = call_arguments(pipe)
    for name in [name for name in arguments if name.startswith("negative")]:
        del arguments[name]
    with attach(pipe, plan_of(3.0)), pytest.raises(InputError, match=r"made 1 evaluation\(s\) in a step and no two"):
        pipe(**arguments)


def test_another_combination_is_an_error():
    pipe = tiny_stable_diffusion()
    with attach(pipe, plan_of(3.0)):
        step = type(pipe.scheduler).step
        pipe.scheduler.__class__.step = lambda self, output, t, x, **options: step(self, output**3, t, x, **options)
        with pytest.raises(InputError, match="does not combine its branches as uncond"):
            pipe(**call_arguments(pipe))


def test_zero_terminal_snr_and_epsilon():
    pipe = tiny_stable_diffusion(DDIMScheduler(prediction_type="epsilon", clip_sample=False))
    solver = DiffusersSolver(scheduler="DDIMScheduler", config={"rescale_betas_zero_snr": True})
    with pytest.raises(InputError, match="epsilon prediction is undefined at zero terminal SNR"):
        attach(pipe, Plan(solver=solver))


def test_constant_guidance_and_the_schedule_of_one_scale_are_one():
    pipe = tiny_dit()
    constant = Plan(grid=SpacingGrid(steps=4), guidance=ConstantGuidance(scale=2.5))
    assert np.array_equal(images_of(pipe, constant)[0], images_of(pipe, plan_of(2.5, steps=4))[0])
