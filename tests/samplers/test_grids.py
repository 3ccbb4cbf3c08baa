"""Explicit grids: what is listed is what runs, with the true coefficients between the points."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny import call_arguments, tiny_qwen, tiny_sd3, tiny_stable_diffusion, tiny_unet

from fewstep.samplers import DiffusersSolver, ExplicitGrid, InputError, Plan, Process, SpacingGrid, attach
from fewstep.samplers.explicit import grid_adapter
from fewstep.samplers.wrapped import wrap_scheduler

SOLVERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
UNEVEN = (999, 871, 640, 333, 210, 64, 9)
VARIANCE = 0.3**2


def gaussian_network(process: Process, x, t):
    """The exact epsilon for data N(0, VARIANCE): sigma x / (alpha^2 VARIANCE + sigma^2)."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return sigma * x / (alpha**2 * VARIANCE + sigma**2)


def exact_map(process, x, first, last_alpha, last_sigma):
    """The probability-flow ODE of Gaussian data scales x by the ratio of the marginal standard deviations."""
    start = (process.alpha(first) ** 2 * VARIANCE + process.sigma(first) ** 2) ** 0.5
    return x * (last_alpha**2 * VARIANCE + last_sigma**2) ** 0.5 / start


def sample(scheduler, timesteps, x):
    """Runs a wrapped scheduler on an explicit grid in float64, from the network's x to the end."""
    process = Process.from_scheduler(scheduler)
    wrap_scheduler(scheduler, grid_adapter(scheduler, tuple(timesteps)))
    scheduler.set_timesteps(7)
    for t in scheduler.timesteps:
        out = gaussian_network(process, x, float(t))
        x = scheduler.step(out, t, x).prev_sample
    return x


@pytest.mark.parametrize("steps", [1, 5, 10])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_schedulers_own_grid_given_as_a_list_is_itself_bit_for_bit(name, spacing, steps):
    pipe = tiny_stable_diffusion()
    solver = DiffusersSolver(scheduler=SOLVERS[name].__name__)
    with attach(pipe, Plan(solver=solver, grid=SpacingGrid(steps=steps, spacing=spacing))) as handle:
        own = pipe(**call_arguments(pipe)).images
    listed = ExplicitGrid(timesteps=tuple(step.timestep for step in handle.stats.steps))
    config = {"timestep_spacing": spacing}  # Euler's init_noise_sigma depends on it
    with attach(pipe, Plan(solver=solver.model_copy(update={"config": config}), grid=listed)):
        assert np.array_equal(pipe(**call_arguments(pipe)).images, own)


def test_flow_matching_own_grid_given_as_a_list():
    """Bit for bit up to the division by 1000 and back, one rounding of float32."""
    pipe = tiny_sd3()
    with attach(pipe, Plan(grid=SpacingGrid(steps=6))) as handle:
        own = pipe(**call_arguments(pipe)).images
    listed = Plan(grid=ExplicitGrid(timesteps=tuple(step.timestep for step in handle.stats.steps)))
    with attach(pipe, listed):
        np.testing.assert_allclose(pipe(**call_arguments(pipe)).images, own, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_network_is_told_the_listed_times(name):
    pipe = tiny_unet()
    told = []
    pipe.unet.register_forward_pre_hook(lambda module, args: told.append(float(args[1])))
    grid = (999, 700.25, 333, 20.5)
    plan = Plan(solver=DiffusersSolver(scheduler=SOLVERS[name].__name__), grid=ExplicitGrid(timesteps=grid))
    with attach(pipe, plan) as handle:
        pipe(**call_arguments(pipe))
    assert told == list(grid)
    assert [step.timestep for step in handle.stats.steps] == list(grid)


@pytest.mark.parametrize("grid", [UNEVEN, (999, 500.5, 12.25)])
def test_ddim_lands_where_equation_12_says(grid):
    """Overwriting ``.timesteps`` of DDIM gives other coefficients: its steps are num_train // steps wide."""
    scheduler = DDIMScheduler(clip_sample=False)
    process = Process.from_scheduler(scheduler)
    x = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = sample(scheduler, grid, x)
    for t, s in zip(grid, (*grid[1:], None), strict=True):
        out = gaussian_network(process, x, t)
        x0 = (x - process.sigma(t) * out) / process.alpha(t)
        x = x0 if s is None else process.alpha(s) * x0 + process.sigma(s) * out
    torch.testing.assert_close(got, x, rtol=5e-6, atol=2e-5)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("dpm", 2), ("unipc", 2)])
def test_solvers_keep_their_order_on_an_uneven_grid(name, order):
    """Error against the closed form, halving the steps of a non-uniform grid."""
    x = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (20, 40, 80):
        base = SOLVERS[name](beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
        options = {"clip_sample": False} if name == "ddim" else {"final_sigmas_type": "sigma_min"}
        scheduler = SOLVERS[name].from_config(base.config, **options)
        if name == "ddim":
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
        process = Process.from_scheduler(scheduler)
        # uneven: denser at the clean end, a smooth map of a uniform grid in log-SNR
        lo, hi = process.log_snr(900.0), process.log_snr(0.0)
        u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:-1] ** 1.3
        grid = [float(process.time_of_log_snr(lo + (hi - lo) * v)) for v in u]
        got = sample(scheduler, grid, x)
        truth = exact_map(process, x, grid[0], process.alpha(0.0), process.sigma(0.0))
        errors.append(float((got - truth).abs().max()))
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert slopes[-1] > order - 0.35, (errors, slopes)
    assert slopes[-1] < order + 1.2, (errors, slopes)


def test_explicit_flow_times_carry_no_shift():
    pipe = tiny_sd3(FlowMatchEulerDiscreteScheduler(shift=3.0))
    grid = (1000, 600, 250.5)
    with attach(pipe, Plan(grid=ExplicitGrid(timesteps=grid))) as handle:
        pipe(**call_arguments(pipe))
        torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor([1.0, 0.6, 0.2505, 0.0]))
    assert [step.timestep for step in handle.stats.steps] == list(grid)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_flow_sigmas_on_multistep_solvers(scheduler):
    """Order 1 of both is Euler of the flow."""
    x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 1}
    grid = (999, 640, 250, 50)
    results = []
    for made in (scheduler(**flow), FlowMatchEulerDiscreteScheduler()):
        wrap_scheduler(made, grid_adapter(made, grid))
        made.set_timesteps(4)
        y = x
        for t in made.timesteps:
            y = made.step(torch.sin(y) - 0.3, t, y).prev_sample
        results.append(y)
    if scheduler is DPMSolverMultistepScheduler:
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    else:  # UniPC corrects even at order 1: same grid, another method
        assert (results[0] - results[1]).abs().max() < 0.2


def flow_multistep(**options):
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 1}
    return DiffusersSolver(scheduler="DPMSolverMultistepScheduler", config=flow | options)


@pytest.mark.parametrize("grid", [ExplicitGrid(timesteps=(990, 640, 250)), SpacingGrid(steps=3)])
def test_a_pipeline_that_hands_over_sigmas_runs_a_solver_that_takes_none(grid):
    """Order 1 is Euler of the flow; on a spacing each has a grid of its own."""
    pipe, listed = tiny_qwen(), isinstance(grid, ExplicitGrid)
    images, times = [], []
    for solver in (None, flow_multistep()):
        with attach(pipe, Plan(solver=solver, grid=grid)) as handle:
            parameters = inspect.signature(pipe.scheduler.set_timesteps).parameters
            assert "sigmas" in parameters
            assert not listed or "timesteps" in parameters
            images.append(pipe(**call_arguments(pipe)).images)
            times.append([step.timestep for step in handle.stats.steps])
    if listed:
        assert times == [list(grid.timesteps)] * 2
        torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)
    assert len(times[1]) == 3
    with attach(pipe, Plan(solver=flow_multistep())):
        assert "sigmas" not in inspect.signature(pipe.scheduler.set_timesteps).parameters
        with pytest.raises(ValueError, match="does not support custom sigmas"):
            pipe(**call_arguments(pipe), sigmas=[1.0, 0.5])


def test_img2img_noise_on_a_grid_with_fractions():
    scheduler = DDIMScheduler()
    process = Process.from_scheduler(scheduler)
    wrap_scheduler(scheduler, grid_adapter(scheduler, (900.0, 400.5, 10.0)))
    scheduler.set_timesteps(3)
    x0, noise = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    got = scheduler.add_noise(x0, noise, scheduler.timesteps[1:2].repeat(2))
    torch.testing.assert_close(got, process.add_noise(x0, noise, 400.5))


@pytest.mark.parametrize("time", [0, -3, 1001])
def test_flow_times_out_of_range(time):
    with pytest.raises(InputError, match="out of range; flow-matching times are above 0 and at most 1000"):
        grid_adapter(FlowMatchEulerDiscreteScheduler(), tuple(sorted((500.0, float(time)), reverse=True)))


def test_ddim_off_the_grid():
    scheduler = DDIMScheduler()
    wrap_scheduler(scheduler, grid_adapter(scheduler, (900.0, 400.0)))
    scheduler.set_timesteps(2)
    with pytest.raises(InputError, match="are not on the plan's grid"):
        scheduler.step(torch.zeros(1), 500, torch.zeros(1))
