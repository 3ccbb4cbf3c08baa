"""Epsilon scaling: the noise that the solver uses, divided, whatever the network predicts."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from tiny import TINY, call_arguments, generators, tiny_scheduler, tiny_unet

from fewstep.samplers import DiffusersSolver, InputError, Plan, Process, SpacingGrid, attach
from fewstep.samplers.call import Step
from fewstep.samplers.epsilon_scaling import EpsilonScaling
from fewstep.samplers.part import Run

LINEAR = EpsilonScaling(scale=1.01, slope=0.02)


def images(pipe, plan):
    with attach(pipe, plan):
        return pipe(**call_arguments(pipe), num_inference_steps=4).images


@pytest.mark.parametrize("name", TINY)
def test_a_scale_of_one_is_bit_identical(name):
    pipe = TINY[name]()
    plain = pipe(**call_arguments(pipe), num_inference_steps=4).images
    np.testing.assert_array_equal(images(pipe, Plan(correction=EpsilonScaling(scale=1))), plain)
    assert np.abs(images(pipe, Plan(correction=EpsilonScaling(scale=1.1))) - plain).max() > 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_is_ddim_by_hand_with_less_noise(prediction):
    pipe = tiny_unet(scheduler=tiny_scheduler(prediction_type=prediction))
    plan = Plan(grid=SpacingGrid(steps=4, spacing="trailing"), correction=LINEAR)
    with attach(pipe, plan):
        got = pipe(batch_size=2, generator=generators(2), output_type="np").images
    table = pipe.scheduler.alphas_cumprod.double()
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators(2)])
    for left, t in zip((3, 2, 1, 0), (999, 749, 499, 249), strict=True):
        a, s = table[t].sqrt(), (1 - table[t]).sqrt()
        with torch.no_grad():
            out = pipe.unet(x, t).sample.double()
        eps = {"epsilon": out, "v_prediction": a * out + s * x, "sample": (x - a * out) / s}[prediction]
        eps = eps / (1.01 + 0.02 * left)
        end = table[t - 250] if left else torch.tensor(1.0).double()
        x = (end.sqrt() * (x - s * eps) / a + (1 - end).sqrt() * eps).float()
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    # an epsilon network's x0 is 1/alpha = 157 times as uncertain as its output, where sampling begins
    np.testing.assert_allclose(got, expected, atol=2e-4)


def step_of(scheduler, output, x, index=0):
    return Step(index, float(scheduler.timesteps[index]), 0.0, Process.from_scheduler(scheduler), scheduler, output, x)


def hook(part, scheduler):
    run = Run(tiny_unet(), scheduler)
    part.prepare(run, frozenset())
    return run.hooks[0]()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_learned_variance_stays(prediction):
    scheduler = DDPMScheduler(prediction_type=prediction, variance_type="learned_range")
    scheduler.set_timesteps(10)
    x, output = torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
    step = step_of(scheduler, output, x, index=4)
    hook(EpsilonScaling(scale=1.25), scheduler).before_step(step)
    process = step.process
    torch.testing.assert_close(step.output[:, 3:], output[:, 3:], rtol=0, atol=0)
    before, after = (process.to_eps(out[:, :3], x, step.time) for out in (output, step.output))
    torch.testing.assert_close(after, before / 1.25)


def test_a_learned_variance_pipeline_runs():
    pipe = tiny_unet(DDPMPipeline, DDPMScheduler(variance_type="learned_range", clip_sample=False))
    narrow = pipe.unet.conv_out
    pipe.unet.conv_out = torch.nn.Conv2d(narrow.in_channels, 2, 3, padding=1)
    with attach(pipe, Plan(grid=SpacingGrid(steps=3), correction=LINEAR)):
        assert np.isfinite(pipe(batch_size=2, generator=generators(2), output_type="np").images).all()


def test_pure_noise_is_left_alone():
    """At zero terminal SNR the state is the noise: the output says something of x0 only."""
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(4)
    output, x = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    scaling = hook(EpsilonScaling(scale=1.25), scheduler)
    first, second = step_of(scheduler, output, x, 0), step_of(scheduler, output, x, 1)
    scaling.before_step(first)
    scaling.before_step(second)
    assert first.output is output
    assert second.output is not output


def test_runs_on_flow_matching_and_on_two_evaluations_a_step():
    for name, solver in (("sd3", "FlowMatchHeunDiscreteScheduler"), ("unet", "HeunDiscreteScheduler")):
        plan = Plan(solver=DiffusersSolver(scheduler=solver), correction=EpsilonScaling(scale=1.02))
        assert np.isfinite(images(TINY[name](), plan)).all()


def test_errors():
    with pytest.raises(InputError, match="scale: Input should be greater than 0; got 0"):
        Plan.from_json({"fewstep_plan": 1, "correction": {"type": "epsilon-scaling", "scale": 0}})
    plan = Plan(grid=SpacingGrid(steps=5), correction=EpsilonScaling(scale=1, slope=-0.25))
    with pytest.raises(InputError, match=r"divides by 0 where 4 steps are left; raise its slope -0\.25"):
        attach(tiny_unet(), plan)
    scheduler = tiny_scheduler()
    scheduler.set_timesteps(4)
    step = step_of(scheduler, torch.randn(2, 3, 4, 4), torch.randn(2, 1, 4, 4))
    with pytest.raises(InputError, match=r"output of shape \(2, 3, 4, 4\) for a state of shape \(2, 1, 4, 4\)"):
        hook(EpsilonScaling(scale=1.1), scheduler).before_step(step)
