"""The consistency family as methods: their formulas on teachers in closed form, and plans that land as they trained."""

import math

import pytest
import torch
from analytic import EDM, MIXTURE, Gaussian, Mixture, column, consistent, shifted
from analytic_team import loss_of, moment_at
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, TCDScheduler
from tiny import call_arguments, tiny_stable_diffusion

from fewstep.distill.methods import CD, ECT, LCF, LCM, PCM, TCD, TSCD
from fewstep.distill.predict import Prediction
from fewstep.distill.solvers import Heun
from fewstep.distill.spans import GridSpans
from fewstep.distill.team import noise_like
from fewstep.samplers import InputError, Process, attach
from fewstep.samplers.explicit import grid_adapter
from fewstep.samplers.part import Run
from fewstep.samplers.wrapped import wrap_scheduler

SCHEDULERS = {
    "vp": DDIMScheduler(set_alpha_to_one=False, clip_sample=False),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "edm": EDMEulerScheduler(),
}
PROCESSES = {name: Process.from_scheduler(scheduler) for name, scheduler in SCHEDULERS.items()}
EVERY = pytest.mark.parametrize("name", PROCESSES)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def made(plan, name):
    """The plan's scheduler on its grid, as it is in a pipeline that keeps x itself."""
    run = Run(None, SCHEDULERS[name].__class__.from_config(SCHEDULERS[name].config))
    plan.solver.prepare(run, frozenset())
    wrap_scheduler(run.scheduler, grid_adapter(run.scheduler, plan.grid.timesteps)).native = True
    run.scheduler.set_timesteps(1)
    return run.scheduler


def sampled(plan, name, student, x, **options):
    """Where the plan takes ``x`` (B, ...) from its first time, the network being what the student says."""
    process, scheduler = PROCESSES[name], made(plan, name)
    for t in scheduler.timesteps:
        time = t.double().expand(len(x))
        out = process.from_x0(student(x, time).x0, x, time)
        x = scheduler.step(out, t, x, return_dict=False, **options)[0].double()
    return x


def start(name, time, count=50):
    noise = torch.randn(count, 3, generator=generator(), dtype=torch.float64)
    return noise * float(PROCESSES[name].sigma(time))


@EVERY
@pytest.mark.parametrize("method", [CD, LCM, LCF, ECT, PCM, TCD, TSCD])
def test_trains_and_has_a_plan_on_every_process(name, method):
    """A student that is wrong has a finite loss, and the scheduler of the plan takes its times."""
    process, more = PROCESSES[name], {"eta": 0.0} if method is TCD and name == "edm" else {}
    method = method(**more)
    teacher = Mixture(process, *MIXTURE)
    roles = {role: shifted(teacher, process, 0.2) for role in ("student", "target")} | {"teacher": teacher}
    assert loss_of(method, process, roles, teacher.draw(20, 3)).isfinite().all()
    scheduler = made(method.plan(process, 4), name)
    assert len(scheduler.timesteps) == 4
    assert float(scheduler.timesteps[0]) == pytest.approx(process.time_range.noisiest)


@EVERY
def test_a_phased_student_is_sampled_at_its_edges(name):
    """The true student of the edges, sampled by the plan, is the ODE from noise to clean data; no other edges are."""
    process, method = PROCESSES[name], PCM(grid_steps=10, phases=3)
    teacher = Mixture(process, *MIXTURE)
    plan = method.plan(process, 3)
    span = method.spans(process, moment_at())(process, 300, generator())
    assert set(span.s.tolist()) == {process.clean_time, *plan.grid.timesteps[1:]}
    edges = torch.tensor([process.clean_time, *plan.grid.timesteps[::-1]], dtype=torch.float64)

    def end(t):
        return edges[(torch.searchsorted(edges, t - 1e-4 * t.abs().clamp(min=1e-3)) - 1).clamp(min=0)]

    x = start(name, plan.grid.timesteps[0])
    got = sampled(plan, name, consistent(process, teacher.map, end), x)
    ends = (torch.full((len(x),), time, dtype=torch.float64) for time in (plan.grid.timesteps[0], process.clean_time))
    torch.testing.assert_close(got, teacher.map(x, *ends), rtol=2e-3, atol=2e-3)
    with pytest.raises(InputError, match=r"a student of 3 phases is sampled in as many steps; got 4"):
        method.plan(process, 4)


def test_a_linear_student_of_cd_learns_the_one_step_map():
    """Gaussian data on EDM: the fixed point is Heun's method over the grid, which is near the true map."""
    teacher = Gaussian(EDM)
    method = CD(grid_steps=10, target_decay=0.5)
    times = torch.tensor(method.points(EDM)[1:], dtype=torch.float64)
    weights = {role: torch.zeros(2, len(times), dtype=torch.float64) for role in ("student", "target")}
    weights["student"].requires_grad_()

    def denoiser(role):
        def denoise(x, t):
            gain, offset = (column(part, x) for part in weights[role][:, (times - t[:, None]).abs().argmin(dim=1)])
            sigma = column(EDM.sigma(t), x)
            x0 = gain * x / (sigma**2 + 1).sqrt() + offset
            return Prediction(x0, (x - x0) / sigma)

        return denoise

    roles = {role: denoiser(role) for role in weights} | {"teacher": teacher}
    optimiser = torch.optim.Adam([weights["student"]], lr=0.03, betas=(0.9, 0.95))
    for step in range(350):
        for group in optimiser.param_groups:
            group["lr"] = 0.03 * (1 - step / 350)
        x0 = teacher.draw(128, 4, seed=step)
        optimiser.zero_grad()
        loss_of(method, EDM, roles, x0, moment=moment_at(step, rows=128)).mean().backward()
        optimiser.step()
        weights["target"].lerp_(weights["student"].detach(), 0.5)
    x = 80 * torch.randn(50, 4, generator=generator(), dtype=torch.float64)
    path = [torch.full((50,), time, dtype=torch.float64) for time in reversed(method.points(EDM))]
    landed = denoiser("target")(x, path[0]).x0
    torch.testing.assert_close(landed, Heun()(EDM, teacher, x, *path), rtol=0.02, atol=0.02)
    assert (landed - teacher.map(x, path[0], path[-1])).abs().mean() < 0.1


@EVERY
def test_cds_grid_is_even_in_the_root_of_sigma_over_alpha(name):
    process, method = PROCESSES[name], CD(grid_steps=7)
    clean, *times = method.points(process)
    assert clean == process.clean_time
    assert len(times) == 7
    assert times[-1] == pytest.approx(process.time_range.noisiest)
    levels = (-process.log_snr(torch.tensor(times, dtype=torch.float64)) / 2).exp()
    inner = levels[levels.isfinite()] ** (1 / 7)
    torch.testing.assert_close(inner.diff(), inner.diff()[:1].expand(len(inner) - 1), rtol=1e-6, atol=1e-6)
    if name == "flow":
        torch.testing.assert_close(levels[[0, -2]], torch.tensor([0.002, 80.0], dtype=torch.float64))


@pytest.mark.parametrize("step", [0, 299, 300, 2000])
def test_consistency_tuning_is_its_formula(step):
    """EDM: |D(t) - D(r)| / (t - r) with the shrinking r, data itself where r is 0, and no teacher."""
    method, teacher = ECT(stage_steps=300, stages=3, time_std=1.0), Gaussian(EDM)
    assert set(method.kinds(None, None)) == {"student"}
    x0, moment = teacher.draw(60, 3), moment_at(step, rows=60)
    student = shifted(teacher, EDM, 0.3)
    loss = loss_of(method, EDM, {"student": student}, x0, moment=moment)
    again = moment_at(step, rows=60)
    t = method.spans(EDM, again).times(EDM, 60, again.generators)
    noise = noise_like(x0, again)
    sigma = EDM.sigma(t)
    gap = (1 + 8 / (1 + torch.exp(sigma))) / 2.0 ** (min(step // 300, 2) + 1)
    nearer = sigma * (1 - gap).clamp(min=0)
    at_t = student(x0 + column(sigma, x0) * noise, t).x0
    at_r = student(x0 + column(nearer, x0) * noise, (nearer.clamp(min=1e-3)).log() / 4).x0
    at_r = torch.where(column(nearer, x0) > 0.002, at_r, x0)
    nearer = torch.where(nearer > 0.002, nearer, 0.0)
    c = 0.00054 * math.sqrt(3)
    wanted = (((at_t - at_r).square().sum(dim=1) + c**2).sqrt() - c) / (sigma - nearer)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)


def test_fine_tuning_is_its_formula():
    """LCM's boundary at two neighbours with the same data and noise, and no teacher."""
    process, method = PROCESSES["vp"], LCF(grid_steps=5, target_decay=None, distance="l2")
    assert set(method.kinds(None, None)) == {"student"}
    teacher = Gaussian(process)
    student = shifted(teacher, process, 0.3)
    x0, again = teacher.draw(40, 3), moment_at(rows=40)
    loss = loss_of(method, process, {"student": student}, x0)
    t, r, _ = GridSpans((-1.0, 199.0, 399.0, 599.0, 799.0, 999.0))(process, 40, again.generators)
    noise = noise_like(x0, again)

    def boundary(time):
        alpha = column(SCHEDULERS["vp"].alphas_cumprod[time.long().clamp(min=0)].double(), x0)
        x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        u = column(10 * time, x0)
        jumped = 0.25 / (u**2 + 0.25) * x + u / (u**2 + 0.25).sqrt() * student(x, time.clamp(min=0)).x0
        return torch.where(column(time, x0) < 0, x0, jumped)

    torch.testing.assert_close(loss, (boundary(t) - boundary(r)).square().mean(dim=1), rtol=1e-4, atol=1e-5)


def test_the_plan_of_tcd_is_its_scheduler_with_its_eta():
    """As the stock pipeline with TCDScheduler, which takes eta from the call; with the plan the call cannot say it."""
    pipe = tiny_stable_diffusion()
    plan = TCD(grid_steps=10, eta=0.4).plan(Process.from_scheduler(pipe.scheduler), 3)
    arguments = call_arguments(pipe) | {"output_type": "latent", "generator": None}
    arguments.pop("num_inference_steps", None)
    with attach(pipe, plan):
        got = pipe(**arguments | {"generator": generator()}).images
        with pytest.raises(InputError, match=r"the plan sets eta=0.4; got eta=0.7 in the call; leave it out"):
            pipe(**arguments, eta=0.7)
    known = {key: value for key, value in pipe.scheduler.config.items() if key != "_use_default_values"}
    pipe.scheduler = TCDScheduler.from_config(known)
    times = [int(time) for time in plan.grid.timesteps]
    wanted = pipe(**arguments | {"generator": generator()}, timesteps=times, eta=0.4).images
    other = pipe(**arguments | {"generator": generator()}, timesteps=times, eta=0.0).images
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(wanted), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(torch.as_tensor(got), torch.as_tensor(other), atol=1e-2)


def test_tcd_on_a_flow_jumps_past_the_next_time_and_returns():
    process, eta = PROCESSES["flow"], 0.3
    plan = TCD(grid_steps=8, eta=eta).plan(process, 2)
    teacher = Gaussian(process)
    x = start("flow", 1000.0).float()
    got = sampled(plan, "flow", teacher, x, generator=generator(3))
    first, second = plan.grid.timesteps
    down = second * (1 - eta * (1 - second / first))
    landed = process.jump(x, first, down, **teacher(x, torch.full((50,), first))._asdict())
    x = process.travel(landed, down, second, torch.randn(x.shape, generator=generator(3)))
    wanted = teacher(x, torch.full((50,), second)).x0
    torch.testing.assert_close(got, wanted.double(), rtol=1e-4, atol=1e-4)


def test_tcd_on_edm_is_sampled_without_noise():
    with pytest.raises(InputError, match=r"no stochastic trajectory sampler for EDM; set eta to 0, not 0.3"):
        TCD().plan(EDM, 4)
    assert TCD(eta=0.0).plan(EDM, 4).solver.scheduler == "EDMEulerScheduler"


def test_multistep_sampling_on_edm_is_ancestral():
    process, teacher = PROCESSES["edm"], Gaussian(PROCESSES["edm"])
    plan = CD(grid_steps=10).plan(process, 2)
    x = start("edm", plan.grid.timesteps[0]).float()
    got = sampled(plan, "edm", teacher, x, generator=generator(3))
    first, second = plan.grid.timesteps
    noise = torch.randn(x.shape, generator=generator(3))
    x0 = teacher(x, torch.full((50,), first)).x0
    x = process.jump(x, first, second, x0=x0, eta=1.0, noise=noise)
    torch.testing.assert_close(got, teacher(x, torch.full((50,), second)).x0.double(), rtol=1e-3, atol=1e-3)


def test_segments_fall_from_stage_to_stage():
    method, process = TSCD(grid_steps=16, stage_steps=100), PROCESSES["flow"]
    assert [(stage.start, stage.fresh) for stage in method.turns().stages] == [
        (0, ()),
        *((start, ("student",)) for start in (100, 200, 300)),
    ]
    points = method.points(process)
    for stage, count in enumerate((8, 4, 2, 1)):
        span = method.spans(process, moment_at(stage=stage))(process, 4000, generator())
        t, s = (torch.tensor([points.index(time) for time in times.tolist()]) for times in (span.t, span.s))
        assert torch.equal((t - 1) // (16 // count), s // (16 // count))
        assert ((t - s).max(), (t - s).min()) == (16 // count, 1)


def test_no_step_of_tscd_leaves_its_segment():
    method, process = TSCD(grid_steps=30, segments=(8, 3)), PROCESSES["vp"]
    points = method.points(process)
    edges = {points[10], points[20]}
    assert set(method.plan(process, 3).grid.timesteps) == {*edges, points[30]}
    assert edges < set(method.plan(process, 12).grid.timesteps) < set(points)
    for steps in (2, 4, 33):
        words = rf"3 segments is sampled in a multiple of that, up to its 30 grid steps; got {steps}"
        with pytest.raises(InputError, match=words):
            method.plan(process, steps)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PCM(grid_steps=3, phases=4), r"segments must be 1 to 3, the number of steps; got 4"),
        (lambda: TSCD(segments=(4, 4)), r"segments must fall from stage to stage; got \(4, 4\)"),
        (lambda: TSCD(grid_steps=4), r"segments must be 1 to 4, the number of steps; got 8"),
        (lambda: LCM().plan(PROCESSES["vp"], 51), r"trained at 50 times, and cannot be sampled in 51 steps"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
