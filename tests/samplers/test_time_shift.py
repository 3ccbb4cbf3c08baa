"""The time-shift part: the times it tells, against plain loops and closed forms."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.pipelines.ddim import pipeline_ddim
from tiny import TINY, call_arguments, generators, tiny_dit, tiny_scheduler, tiny_unet

from fewstep.samplers import DiffusersSolver, ExplicitGrid, InputError, Part, Plan, Process, SpacingGrid, attach
from fewstep.samplers.call import CallHook
from fewstep.samplers.guidance_schedule import GuidanceSchedule
from fewstep.samplers.time_shift import TimeShift

SHIFT = TimeShift(window=120, cutoff=150)


def run(pipe, plan, **call):
    """Images, and the times that the network was told, (evaluations, rows) as a list of arrays."""
    told = []

    def record(module, args, kwargs):
        x = kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]
        told.append(torch.as_tensor(kwargs["timestep"]).double().expand(len(x)).numpy().copy())

    network = getattr(pipe, "transformer", None) or pipe.unet
    handle = network.register_forward_pre_hook(record, with_kwargs=True)
    with attach(pipe, plan):
        images = pipe(**call).images
    handle.remove()
    return images, told


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("part", [TimeShift(window=0), TimeShift(window=80, cutoff=1000)], ids=["window", "cutoff"])
def test_off_is_bit_identical(name, part):
    pipe = TINY[name]()
    plain = pipe(**call_arguments(pipe), num_inference_steps=4).images
    with attach(pipe, Plan(conditioning=part)):
        images = pipe(**call_arguments(pipe), num_inference_steps=4).images
    np.testing.assert_array_equal(images, plain)


def nearest(variance, centre, half, table, data_variance):
    """The train step whose variance is nearest, by the paper's loop in plain Python."""
    best = None
    for k in range(centre - half, centre + half + 1):
        k = min(max(k, 0), 999)
        expected = table[k] * data_variance + 1 - table[k]
        if best is None or abs(variance - expected) < best[0]:
            best = (abs(variance - expected), k)
    return float(best[1])


def loop(unet, scheduler, part, *, count=3, steps=5, half=None, first=False):
    """The paper's algorithm around the stock scheduler; returns images and told times."""
    half = part.window // 2 if half is None else half
    table = scheduler.alphas_cumprod.double()
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators(count)])
    scheduler.set_timesteps(steps)
    told, mean = [], None
    for index, t in enumerate(scheduler.timesteps):
        times = torch.full((count,), float(t))
        if (index > 0 or first) and t > part.cutoff:
            rest = x if mean is None else x - table[int(t)].sqrt().float() * mean
            for row in range(count):
                variance = float(rest[row].double().var())
                times[row] = nearest(variance, int(t), half, table.tolist(), part.data_variance or 0.0)
        told.append(times.double().numpy())
        with torch.no_grad():
            out = unet(x, times).sample
        a, s = table[int(t)].sqrt().float(), (1 - table[int(t)]).sqrt().float()
        if part.criterion == "residual":
            mean = a * x - s * out
        x = scheduler.step(out, t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), told


ONE_EVALUATION = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "f-pndm": (PNDMScheduler, {}),
    "s-pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "dpm-solver++": (DPMSolverMultistepScheduler, {}),
    "deis": (DEISMultistepScheduler, {}),
}


@pytest.mark.parametrize("name", ONE_EVALUATION)
@pytest.mark.parametrize(
    "part",
    [SHIFT, TimeShift(window=90, cutoff=100, criterion="data-variance", data_variance=0.2)],
    ids=lambda part: part.criterion,
)
def test_is_the_papers_algorithm_around_the_stock_scheduler(name, part):
    cls, options = ONE_EVALUATION[name]
    pipe = tiny_unet()
    plan = Plan(solver=DiffusersSolver(scheduler=cls.__name__, config=options), conditioning=part)
    images, told = run(pipe, plan, batch_size=3, generator=generators(3), num_inference_steps=5, output_type="np")
    scheduler = cls.from_config(pipe.scheduler.config, **options)
    expected, times = loop(pipe.unet, scheduler, part)
    np.testing.assert_array_equal(np.stack(told), np.stack(times))
    assert len({tuple(row) for row in np.stack(told).T}) > 1, "the samples must differ in their times"
    np.testing.assert_allclose(images, expected, atol=2e-5)


def test_the_deis_variant_has_twice_the_window_and_shifts_the_first_evaluation():
    part = TimeShift(window=40, cutoff=100, criterion="paper", variant="deis")
    pipe = tiny_unet()
    plan = Plan(solver=DiffusersSolver(scheduler="DEISMultistepScheduler"), conditioning=part)
    images, told = run(pipe, plan, batch_size=3, generator=generators(3), num_inference_steps=5, output_type="np")
    scheduler = DEISMultistepScheduler.from_config(pipe.scheduler.config)
    expected, times = loop(pipe.unet, scheduler, part, half=40, first=True)
    np.testing.assert_array_equal(np.stack(told), np.stack(times))
    np.testing.assert_allclose(images, expected, atol=2e-5)


@pytest.mark.parametrize("variant", ["adm", "pndm"])
def test_variants_that_move_the_landing_of_ddim(variant):
    part = TimeShift(window=60, cutoff=100, criterion="paper", variant=variant)
    pipe = tiny_unet()
    plan = Plan(grid=SpacingGrid(steps=5, spacing="trailing"), conditioning=part)
    images, told = run(pipe, plan, batch_size=2, generator=generators(2), output_type="np")
    assert [float(t[0]) for t in told] == [999, 799, 599, 399, 199]
    table = pipe.scheduler.alphas_cumprod.double().tolist()
    for row, generator in enumerate(generators(2)):
        x = torch.randn(1, 1, 8, 8, generator=generator)
        for t in (999, 799, 599, 399, 199):
            goal = t - 200
            if t not in (999, 199) and variant == "adm":
                goal += nearest(float(x.double().var()), t, 30, table, 0.0) - t
            if t not in (999, 199) and variant == "pndm" and goal > 100:
                goal = nearest(float(x.double().var()), goal, 30, table, 0.0)
            a, s = table[t] ** 0.5, (1 - table[t]) ** 0.5
            with torch.no_grad():
                v = pipe.unet(x, t).sample
            end = 1.0 if t == 199 else table[int(goal)]
            x = end**0.5 * (a * x - s * v) + (1 - end) ** 0.5 * (a * v + s * x)
        expected = (x / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(images[row], expected, atol=2e-5)


@pytest.mark.parametrize("guidance", [None, GuidanceSchedule(scale=3.0, window=(0.0, 0.6))], ids=["full", "window"])
def test_each_sample_of_a_guided_batch_is_shifted_as_if_it_were_alone(guidance):
    pipe = tiny_dit(DDPMScheduler(clip_sample=False))
    plan = Plan(grid=SpacingGrid(steps=5), guidance=guidance, conditioning=SHIFT)
    images, told = run(pipe, plan, class_labels=[1, 2, 3], generator=generators(3), output_type="np")
    for row, generator in enumerate(generators(3)):
        single, alone = run(pipe, plan, class_labels=[row + 1], generator=[generator], output_type="np")
        for batch, one in zip(told, alone, strict=True):
            np.testing.assert_array_equal(batch[row::3], one)
        np.testing.assert_allclose(images[row], single[0], atol=2e-5)
    assert any(len(set(times)) > 1 for times in told)


class PointNetwork:
    """The true network for data that are one image, of unit variance; it predicts as the process asks."""

    def __init__(self, process):
        self.process = process
        image = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
        self.image = (image - image.mean()) / image.std()

    def __call__(self, x, time):
        return self.process.from_x0(self.image.expand_as(x), x, time)


def replace_network(monkeypatch, pipe, network, seen):
    """Lets ``network`` (x, times) answer for the U-Net, and keeps the times in ``seen``."""

    def forward(sample, timestep, **_):
        seen.append(torch.as_tensor(timestep).double().expand(len(sample)).clone())
        return UNet2DOutput(sample=network(sample, seen[-1]))

    monkeypatch.setattr(pipe.unet, "forward", forward)


def unit_noise(shape, **_):
    """Noise of which every sample has variance 1 exactly."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(11)).flatten(1)
    return (noise / noise.std(dim=1, keepdim=True)).reshape(shape)


@pytest.mark.parametrize(
    "solver",
    [
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "PNDMScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
    ],
)
def test_the_residual_criterion_shifts_no_sample_that_is_where_it_should_be(solver, monkeypatch):
    """The state of every evaluation is alpha m + sigma eps of the listed time: also those within a step."""
    pipe = tiny_unet(scheduler=tiny_scheduler(prediction_type="epsilon"))  # PNDM's averages are exact for epsilon alone
    if solver.startswith("Flow"):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    plan = Plan(
        solver=DiffusersSolver(scheduler=solver),
        grid=SpacingGrid(steps=5),
        conditioning=TimeShift(window=80, cutoff=50),
    )
    times = []
    with attach(pipe, plan):
        process = Process.from_scheduler(pipe.scheduler)
        network = PointNetwork(process)
        replace_network(monkeypatch, pipe, network, times)
        pipe.scheduler.set_timesteps(5)
        start = float(pipe.scheduler.timesteps[0])
        x = process.add_noise(network.image.expand(2, 1, 8, 8), unit_noise((2, 1, 8, 8)), start)
        monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *_, **__: x)
        pipe(batch_size=2, output_type="np")
        listed = pipe.scheduler.timesteps.double()
    told = torch.stack(times)
    assert (listed > 50).sum() >= 4
    torch.testing.assert_close(told, listed[:, None].expand_as(told), rtol=0, atol=1)


class Rescaled(CallHook):
    """Replaces the state after the first step by an image whose noise, or variance, is off."""

    def __init__(self, make):
        self.make = make

    def after_step(self, step):
        if step.index == 0:
            step.x_next = self.make(step)


class Rescaling(Part):
    type: str = "rescaling"
    make: object

    def prepare(self, run, known_arguments):
        run.hooks.append(lambda: Rescaled(self.make))


def told_after(part, network, make, monkeypatch, times=(900, 600)):
    """The times that the second evaluation is told, when ``make`` decides the state there."""
    pipe = tiny_unet(scheduler=tiny_scheduler(prediction_type="sample"))
    seen = []

    replace_network(monkeypatch, pipe, network, seen)
    monkeypatch.setattr(pipeline_ddim, "randn_tensor", unit_noise)
    plan = Plan(grid=ExplicitGrid(timesteps=times), conditioning=part, correction=Rescaling(make=make))
    with attach(pipe, plan):
        pipe(batch_size=3, output_type="np")
    return seen[1]


FACTORS = torch.tensor([0.9, 1.0, 1.05])[:, None, None, None]
"""What is wrong with the noise, or size, of the three samples."""


def of_gaussian(process, variance):
    """The true network for Gaussian data: x0 = alpha s^2 / (alpha^2 s^2 + sigma^2) x."""

    def network(x, time):
        alpha, sigma = process.alpha(time), process.sigma(time)
        return (alpha * variance / (alpha**2 * variance + sigma**2)).float()[:, None, None, None] * x

    return network


def levels(time):
    process = Process.from_scheduler(tiny_scheduler())
    return float(process.alpha(time)), float(process.sigma(time))


def test_residual_finds_the_noise_of_unit_variance_data_where_the_papers_criterion_is_blind(monkeypatch):
    """Data: one image of variance 1, so that x_t has variance 1 at every t. The noise is made 0.9, 1, 1.05 of sigma."""
    image = unit_noise((1, 1, 8, 8))
    alpha, sigma = levels(300)
    noise = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    basis = torch.stack([torch.ones(64), image.flatten()])
    noise = noise - noise @ torch.linalg.pinv(basis) @ basis  # no mean, and nothing in common with the image
    noise = (noise / noise.std(dim=1, keepdim=True)).reshape(3, 1, 8, 8)

    def told(**options):
        part = TimeShift(window=200, **options)
        state = alpha * image + FACTORS * sigma * noise
        return told_after(part, lambda x, _: image.expand_as(x), lambda _: state, monkeypatch, (900, 300))

    process = Process.from_scheduler(tiny_scheduler())
    steps = torch.arange(200, 401, dtype=torch.float64)
    wanted = torch.stack(
        [steps[(process.sigma(steps) - factor * sigma).abs().argmin()] for factor in FACTORS.flatten()]
    )
    assert wanted[0] < 260 < wanted[1] == 300 < 320 < wanted[2]
    torch.testing.assert_close(told(), wanted, rtol=0, atol=1)
    assert told(criterion="paper").tolist() == [400, 400, 400]


def test_of_gaussian_data_of_unit_variance_too(monkeypatch):
    """A sample that is larger is noisier, says the residual; the paper's criterion answers the noisy end for all."""
    network = of_gaussian(Process.from_scheduler(tiny_scheduler()), 1.0)
    sizes = torch.tensor([0.98, 1.0, 1.02])[:, None, None, None]

    def told(**options):
        part = TimeShift(window=200, **options)
        return told_after(part, network, lambda step: sizes * step.x_next, monkeypatch, (500, 400)).tolist()

    small, right, large = told()
    assert 300 < small < right < large < 500
    assert told(criterion="paper") == [500, 500, 500]


def test_data_variance_finds_the_time_of_gaussian_data(monkeypatch):
    """Data of variance 0.25; the samples have the variance of 560, 600 and 640."""
    process = Process.from_scheduler(tiny_scheduler())
    times = torch.tensor([560.0, 600.0, 640.0], dtype=torch.float64)
    size = (process.alpha(times) ** 2 * 0.25 + process.sigma(times) ** 2).sqrt().float()[:, None, None, None]

    def told(**options):
        network = of_gaussian(process, 0.25)
        return told_after(
            TimeShift(window=120, **options), network, lambda _: size * unit_noise((3, 1, 8, 8)), monkeypatch
        )

    assert told(criterion="data-variance", data_variance=0.25).tolist() == [560, 600, 640]
    assert (told(criterion="paper") > times).all()


def test_the_window_ends_at_the_ends_of_training(monkeypatch):
    process = Process.from_scheduler(tiny_scheduler())
    noisy, clean = 2 * unit_noise((3, 1, 8, 8)), 1e-4 * unit_noise((3, 1, 8, 8))
    part = TimeShift(window=300, criterion="paper")
    network = of_gaussian(process, 0.25)
    assert told_after(part, network, lambda _: noisy, monkeypatch, (999, 900)).tolist() == [999] * 3
    assert told_after(part, network, lambda _: clean, monkeypatch, (999, 100)).tolist() == [0] * 3
    assert told_after(part, network, lambda _: clean, monkeypatch, (999, 500)).tolist() == [350] * 3


def test_clipping_counts_as_the_solver_clips():
    """Clipped, x - alpha x0 is sigma eps as predicted; unclipped it would hold what was cut off as well."""
    pipe = tiny_unet(scheduler=DDIMScheduler(clip_sample=True, clip_sample_range=0.3, prediction_type="v_prediction"))
    part = TimeShift(window=200, cutoff=100)
    _, told = run(pipe, Plan(conditioning=part), batch_size=1, generator=generators(1), num_inference_steps=4)
    table = pipe.scheduler.alphas_cumprod.double()
    x = torch.randn(1, 1, 8, 8, generator=generators(1)[0])
    with torch.no_grad():
        v = pipe.unet(x, 750).sample
    eps = table[750].sqrt() * v + (1 - table[750]).sqrt() * x
    wanted = nearest(float((1 - table[500]) * eps.double().var()), 500, 100, table.tolist(), 0.0)
    assert told[1].tolist() == [wanted]


def test_what_the_pipelines_scheduler_clips_another_solver_does_not():
    """A solver is made from the pipeline's config, and keeps options in its own that its class does not have."""
    plan = Plan(
        conditioning=TimeShift(window=200, cutoff=100), solver=DiffusersSolver(scheduler="DPMSolverMultistepScheduler")
    )
    told = []
    for clips in (True, False):
        ours = DDIMScheduler(clip_sample=clips, clip_sample_range=0.3, prediction_type="v_prediction")
        arguments = {"batch_size": 1, "generator": generators(1), "num_inference_steps": 4}
        told.append([times.tolist() for times in run(tiny_unet(scheduler=ours), plan, **arguments)[1]])
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"criterion": "data-variance"}, "data_variance goes with criterion 'data-variance'; got criterion"),
        ({"data_variance": 0.2}, "got criterion 'residual' and data_variance 0.2"),
        ({"variant": "adm"}, "variant 'adm' looks at the state alone; give it criterion 'paper' or 'data-variance'"),
        ({"window": -1}, "greater than or equal to 0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(InputError, match=message):
        Plan.from_json({"fewstep_plan": 1, "conditioning": {"type": "time-shift", "window": 20} | fields})


MARGINAL = {"criterion": "data-variance", "data_variance": 1.0}


@pytest.mark.parametrize(
    ("name", "solver", "fields", "message"),
    [
        ("unet", None, MARGINAL, "data_variance 1 does not tell the times above 0 apart"),
        ("sd3", None, MARGINAL, "use criterion 'residual', or a higher cutoff"),
        ("unet", "EDMEulerScheduler", {}, "EDMSchedule has other times, remove the part or use another solver"),
        (
            "unet",
            "EulerDiscreteScheduler",
            {"criterion": "paper", "variant": "pndm"},
            "EulerDiscreteScheduler lands otherwise, use DDIMScheduler or variant 'paper'",
        ),
    ],
)
def test_what_cannot_work_is_refused(name, solver, fields, message):
    pipe = TINY[name]()
    solver = solver and DiffusersSolver(scheduler=solver)
    with pytest.raises(InputError, match=message):
        attach(pipe, Plan(solver=solver, conditioning=TimeShift(window=20, **fields)))
    assert "_fewstep_attachment" not in vars(pipe)


def test_flow_data_variance_above_the_turning_point():
    attach(TINY["sd3"](), Plan(conditioning=TimeShift(window=20, cutoff=520, **MARGINAL))).detach()


def test_thresholding_and_eta_are_refused_where_they_are_not_seen():
    with pytest.raises(InputError, match="thresholding=True changes the predicted x0 within the scheduler"):
        attach(tiny_unet(scheduler=tiny_scheduler(thresholding=True)), Plan(conditioning=TimeShift(window=20)))
    pipe = tiny_unet()
    plan = Plan(conditioning=TimeShift(window=20, criterion="paper", variant="adm"))
    with attach(pipe, plan), pytest.raises(InputError, match=r"without noise; got eta=0.5 in the call, leave it out"):
        pipe(batch_size=1, eta=0.5)
