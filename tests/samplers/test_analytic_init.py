"""Analytic-Init: the start is the exact marginal of Gaussian data, for every kind of pipeline and scheduler."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)
from tiny import call_arguments, generators, tiny_dit, tiny_sd3, tiny_stable_diffusion, tiny_unet

from fewstep.samplers import ExplicitGrid, InputError, Plan, PlanWarning, attach
from fewstep.samplers.analytic_init import AnalyticInit, StartStatistics, estimate_start_statistics
from fewstep.samplers.call import CallHook
from fewstep.samplers.process import Process
from fewstep.samplers.recording import clean_samples, record

GRID = ExplicitGrid(timesteps=(800, 500, 100))
SHAPES = {"dit": (4, 4, 4), "unet": (1, 8, 8), "stable-diffusion": (4, 8, 8), "sd3": (4, 8, 8)}


def statistics(shape, variance=0.3, weights=""):
    mean = torch.linspace(-0.5, 0.7, math.prod(shape)).reshape(shape)
    return StartStatistics(mean, variance, 100, weights)


def plan(grid=GRID):
    return Plan(grid=grid, start=AnalyticInit())


class Seen(CallHook):
    """What the network is shown and where the scheduler steps from."""

    def __init__(self):
        self.shown, self.x, self.first = [], [], None

    def evaluate(self, evaluation, proceed):
        self.shown.append(evaluation.x)
        return proceed(evaluation)

    def before_step(self, step):
        self.first = self.first or step
        self.x.append(step.x)


def watched(pipe, the_plan, resources, arguments):
    """The call's images, and what the network and the scheduler saw after the start part."""
    seen = Seen()
    handle = attach(pipe, the_plan, resources)
    handle._run.hooks.append(lambda: seen)
    with handle:
        images = pipe(**arguments).images
    return images, seen


SCHEDULERS = [
    DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    EulerDiscreteScheduler(timestep_spacing="linspace"),
    EulerDiscreteScheduler(timestep_spacing="leading", prediction_type="v_prediction"),
    DPMSolverMultistepScheduler(),
    HeunDiscreteScheduler(),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
]
CASES = [
    *((tiny_unet, scheduler, GRID, (1, 8, 8)) for scheduler in SCHEDULERS),
    *((tiny_stable_diffusion, scheduler, GRID, (4, 8, 8)) for scheduler in SCHEDULERS[:4]),
    (tiny_dit, SCHEDULERS[1], GRID, (4, 4, 4)),
    (tiny_sd3, SCHEDULERS[5], GRID, (4, 8, 8)),
    (tiny_stable_diffusion, EDMEulerScheduler(sigma_max=80.0), ExplicitGrid(timesteps=(0.6, 0.1, -0.5)), (4, 8, 8)),
    (tiny_unet, EDMEulerScheduler(sigma_max=80.0), ExplicitGrid(timesteps=(0.6, 0.1, -0.5)), (1, 8, 8)),
]


@pytest.mark.parametrize(
    ("make", "scheduler", "grid", "shape"),
    CASES,
    ids=lambda value: getattr(value, "__name__", type(value).__name__ if not isinstance(value, tuple) else ""),
)
def test_the_seeds_noise_is_mapped_in_every_space(make, scheduler, grid, shape):
    """z is drawn here again from the seeds: x_M must be the formula's, whatever the scheduler multiplies z with."""
    pipe = make()
    pipe.scheduler = type(scheduler).from_config(scheduler.config)  # DDIMPipeline's constructor would convert it
    given = statistics(shape)
    _, seen = watched(pipe, plan(grid), {"start_statistics": given}, call_arguments(pipe, batch=2, seed=5))
    z = torch.cat([torch.randn(1, *shape, generator=generator) for generator in generators(2, 5)])
    process, m = Process.from_scheduler(scheduler), grid.timesteps[0]
    alpha, sigma = process.alpha(m), process.sigma(m)
    expected = alpha * given.mean + (alpha**2 * given.variance + sigma**2).sqrt() * z
    for rows in (seen.x[0], seen.shown[0] / process.input_scale(m)):
        for branch in rows.split(2):
            torch.testing.assert_close(branch, expected.float(), rtol=2e-5, atol=2e-5)


def test_a_hand_written_ddim_loop_from_the_same_start():
    pipe, given = tiny_unet(), statistics((1, 8, 8))
    with attach(pipe, plan(), {"start_statistics": given}):
        images = pipe(**call_arguments(pipe, batch=2)).images
    process, times = Process.from_scheduler(pipe.scheduler), [800.0, 500.0, 100.0, -1.0]
    z = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in generators(2)])
    alpha, sigma = process.alpha(800.0), process.sigma(800.0)
    x = (alpha * given.mean + (alpha**2 * given.variance + sigma**2).sqrt() * z).float()
    with torch.no_grad():
        for here, there in pairwise(times):
            x = process.jump(x, here, there, out=pipe.unet(x, int(here)).sample)
    np.testing.assert_allclose(images, (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_the_start_is_the_marginal_of_gaussian_data():
    """Data N(mean, 0.3 I), statistics estimated from it: mean and covariance at M to the statistical accuracy."""
    truth, draw = statistics((1, 8, 8)), torch.Generator().manual_seed(3)
    data = truth.mean + math.sqrt(truth.variance) * torch.randn(4000, 1, 8, 8, generator=draw)
    estimated = estimate_start_statistics(data)
    pipe = tiny_unet()
    _, seen = watched(
        pipe,
        plan(ExplicitGrid(timesteps=(600,))),
        {"start_statistics": estimated},
        {"batch_size": 4000, "generator": torch.Generator().manual_seed(4), "output_type": "np"},
    )
    process = Process.from_scheduler(pipe.scheduler)
    alpha, sigma = float(process.alpha(600.0)), float(process.sigma(600.0))
    variance = alpha**2 * truth.variance + sigma**2
    x = seen.x[0].flatten(1).double()
    assert alpha * truth.mean.abs().max() > 0.1  # the mean is seen
    error = x.mean(0) - alpha * truth.mean.flatten()
    assert error.abs().max() < 4.5 * math.sqrt(2 * variance / 4000)
    covariance = torch.cov(x.T)
    assert (covariance.diag() / variance - 1).abs().max() < 4.5 * math.sqrt(2 / 4000)
    off = covariance - covariance.diag().diag()
    assert off.abs().max() < 5 * variance / math.sqrt(4000)


@pytest.mark.parametrize("make", [tiny_dit, tiny_unet, tiny_stable_diffusion, tiny_sd3])
def test_unit_statistics_at_the_end_of_a_variance_preserving_process_change_nothing(make):
    """alpha^2 + sigma^2 = 1; on flow matching time 1000 is pure noise, with any statistics."""
    pipe = make()
    shape = SHAPES[{tiny_dit: "dit", tiny_unet: "unet", tiny_stable_diffusion: "stable-diffusion"}.get(make, "sd3")]
    last = 1000 if make is tiny_sd3 else 999
    grid = ExplicitGrid(timesteps=(last, 600, 200))
    given = statistics(shape, 0.3) if make is tiny_sd3 else StartStatistics(torch.zeros(shape), 1.0, 2)
    with attach(pipe, Plan(grid=grid)):
        plain = pipe(**call_arguments(pipe)).images
    with attach(pipe, plan(grid), {"start_statistics": given}):
        np.testing.assert_allclose(pipe(**call_arguments(pipe)).images, plain, atol=2e-6)
    with attach(pipe, plan(), {"start_statistics": statistics(shape)}):
        assert np.abs(pipe(**call_arguments(pipe)).images - plain).max() > 1e-3


@pytest.mark.parametrize("make", [tiny_dit, tiny_stable_diffusion, tiny_sd3])
def test_a_batch_is_its_single_images(make):
    pipe = make()
    shape = SHAPES[{tiny_dit: "dit", tiny_stable_diffusion: "stable-diffusion", tiny_sd3: "sd3"}[make]]
    arguments = call_arguments(pipe, batch=2)
    with attach(pipe, plan(), {"start_statistics": statistics(shape)}):
        both = pipe(**arguments).images
        for index in range(2):
            own = {
                name: value[index : index + 1] if isinstance(value, list | torch.Tensor) else value
                for name, value in arguments.items()
            } | {"generator": generators(1, index)}
            np.testing.assert_allclose(pipe(**own).images[0], both[index], atol=1e-5)


def test_latents_given_in_the_call_are_the_noise():
    pipe, given = tiny_stable_diffusion(), statistics((4, 8, 8))
    z = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators(2)])
    with attach(pipe, plan(), {"start_statistics": given}):
        drawn = pipe(**call_arguments(pipe)).images
        np.testing.assert_array_equal(pipe(**call_arguments(pipe), latents=z).images, drawn)


def test_statistics_in_one_pass_are_those_of_all_samples():
    data = 5 + torch.randn(50, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.rand(2, 3, 3)
    one = estimate_start_statistics(data)
    many = estimate_start_statistics(iter(data.split(7)))
    torch.testing.assert_close(one.mean, data.mean(0))
    assert one.variance == pytest.approx(float(torch.cov(data.flatten(1).T).trace()) / 18, rel=1e-6)
    assert (many.variance, many.n) == (pytest.approx(one.variance, rel=1e-9), 50)
    torch.testing.assert_close(many.mean, one.mean)


def test_statistics_of_the_teachers_own_samples():
    pipe = tiny_dit()
    teacher = Plan(grid=ExplicitGrid(timesteps=(999, 500)))
    calls = [call_arguments(pipe, batch=3, seed=seed) for seed in (0, 3)]
    estimated = estimate_start_statistics(clean_samples(pipe, teacher, calls), pipe.transformer)
    assert (estimated.n, estimated.mean.shape) == (6, (4, 4, 4))
    images = []
    with attach(pipe, teacher), torch.no_grad():
        pipe.vae.decode, decode = lambda z, **_: images.append(z) or decode(z), pipe.vae.decode
        for seed in (0, 3):
            pipe(**call_arguments(pipe, batch=3, seed=seed))
    torch.testing.assert_close(estimated.mean, torch.cat(images).mean(0), atol=1e-6, rtol=1e-5)
    with attach(pipe, plan(), {"start_statistics": estimated}) as handle:
        assert handle.warnings == ()
    with pytest.warns(PlanWarning, match="the start statistics were estimated on other weights"):
        attach(pipe, plan(), {"start_statistics": statistics((4, 4, 4), weights="0" * 64)}).detach()


def test_the_file_beside_the_plan(tmp_path):
    pipe, given = tiny_dit(), statistics((4, 4, 4), weights="")
    plan().save(tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"the analytic-init part names 'start.safetensors', which is not in"):
        attach(pipe, Plan.load(tmp_path / "plan.json"))
    given.save(tmp_path / "start.safetensors")
    again = StartStatistics.load(tmp_path / "start.safetensors")
    assert torch.equal(again.mean, given.mean)
    assert (again.variance, again.n, again.weights) == (given.variance, given.n, given.weights)
    with attach(pipe, plan(), {"start_statistics": given}):
        expected = pipe(**call_arguments(pipe)).images
    with attach(pipe, Plan.load(tmp_path / "plan.json")):
        np.testing.assert_array_equal(pipe(**call_arguments(pipe)).images, expected)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "start.safetensors")
    with pytest.raises(InputError, match="holds no start statistics; make it with estimate_start_statistics"):
        attach(pipe, Plan.load(tmp_path / "plan.json"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: estimate_start_statistics(torch.zeros(1, 2)), "at least 2 samples; got 1"),
        (lambda: estimate_start_statistics([]), "at least 2 samples; got 0"),
        (lambda: estimate_start_statistics([torch.zeros(2, 3), torch.zeros(2, 4)]), r"\(4,\) beside \(3,\)"),
        (lambda: estimate_start_statistics(torch.full((3, 2), math.nan)), "not finite"),
        (lambda: StartStatistics(torch.zeros(2), -0.1, 5), "their variance is negative; estimate them again"),
        (lambda: attach(tiny_dit(), plan(), {"start_statistics": 3}), "is int; give a StartStatistics"),
        (lambda: attach(tiny_dit(), plan()), "load the plan with Plan.load"),
    ],
)
def test_what_is_refused(make, words):
    with pytest.raises(InputError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_samples_of_another_shape_are_refused():
    pipe = tiny_dit()
    with (
        attach(pipe, plan(), {"start_statistics": statistics((4, 8, 8))}),
        pytest.raises(InputError, match=r"samples \(4, 8, 8\), this call's are \(4, 4, 4\); estimate them at this"),
    ):
        pipe(**call_arguments(pipe))


def test_a_narrower_sample_is_refused_too():
    """What is larger in one dimension could be noise with a condition behind it; the scheduler's state tells."""
    pipe = tiny_dit()
    with (
        attach(pipe, plan(), {"start_statistics": statistics((2, 4, 4))}),
        pytest.raises(InputError, match=r"samples \(2, 4, 4\), this call's are \(4, 4, 4\)"),
    ):
        pipe(**call_arguments(pipe))


def test_a_pipeline_that_noises_an_image_is_refused():
    text = tiny_stable_diffusion()
    pipe = StableDiffusionImg2ImgPipeline(**text.components, requires_safety_checker=False)
    with pytest.raises(InputError, match="StableDiffusionImg2ImgPipeline starts from a noised image"):
        attach(pipe, plan(), {"start_statistics": statistics((4, 8, 8))})
    with (
        attach(text, plan(), {"start_statistics": statistics((4, 8, 8))}),
        pytest.raises(InputError, match="starts from a noised image, not from noise; remove the analytic-init"),
    ):
        text.scheduler.add_noise(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.tensor([800]))


def test_a_condition_stacked_behind_the_noise_stays():
    """As in Stable Video Diffusion: the network is shown more channels than the scheduler steps."""
    pipe, given = tiny_unet(), statistics((1, 8, 8))
    image = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    forward, shown = type(pipe.unet).forward, []

    class Conditioned(type(pipe.unet)):
        def forward(self, sample, timestep, **kwargs):
            shown.append(sample)
            return forward(self, sample[:, :1] + 0.1 * sample[:, 1:], timestep, **kwargs)

    class Pipeline(type(pipe)):
        def __call__(self, generator):
            x = torch.cat([torch.randn(1, 1, 8, 8, generator=one) for one in generator])
            self.scheduler.set_timesteps(3)
            for t in self.scheduler.timesteps:
                out = self.unet(torch.cat([x, image], 1), t).sample
                x = self.scheduler.step(out, t, x).prev_sample
            return (x,)

    pipe.unet.__class__, pipe.__class__ = Conditioned, Pipeline
    the_plan = Plan(start=AnalyticInit())
    with torch.no_grad(), attach(pipe, the_plan, {"start_statistics": given}):
        pipe(generators(2))
    process, z = (
        Process.from_scheduler(pipe.scheduler),
        torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators(2)]),
    )
    pipe.scheduler.set_timesteps(3)
    m = float(pipe.scheduler.timesteps[0])
    alpha, sigma = process.alpha(m), process.sigma(m)
    expected = (alpha * given.mean + (alpha**2 * given.variance + sigma**2).sqrt() * z).float()
    torch.testing.assert_close(shown[0], torch.cat([expected, image], 1), rtol=1e-5, atol=1e-6)


def test_recording_leaves_the_plans_start_out():
    pipe, seen = tiny_dit(), Seen()
    stats = record(pipe, plan(), call_arguments(pipe), seen)
    assert (stats.images, len(seen.x)) == (2, 3)
    z = torch.cat([torch.randn(1, 4, 4, 4, generator=generator) for generator in generators(2)])
    torch.testing.assert_close(seen.x[0][:2], z)
