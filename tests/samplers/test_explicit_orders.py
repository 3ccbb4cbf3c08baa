"""Explicit grids on every scheduler: the coefficients between rough points are the true ones."""

import inspect
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import is_torchsde_available
from explicit_cases import (
    NEED_TORCHSDE,
    VARIANCE,
    explicit,
    make,
    rough_grid,
    solve,
    trajectory,
    wavy,
    wide_start,
)

from fewstep.samplers import InputError, Process
from fewstep.samplers.explicit import FACTS
from fewstep.samplers.explicit_multistep import adams_weights

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::DeprecationWarning:numpy")


LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
TO_SMALLEST = {"final_sigmas_type": "sigma_min", "lower_order_final": False}
ORDERS = [
    ("CogVideoXDDIMScheduler", 1, {}, (900.0, 5.0)),
    ("DDIMParallelScheduler", 1, {"clip_sample": False}, (900.0, 5.0)),
    ("DDIMScheduler", 1, {"clip_sample": False}, (900.0, 5.0)),
    ("DEISMultistepScheduler", 1, {"solver_order": 1}, (900.0, 5.0)),
    ("DEISMultistepScheduler", 2, {}, (900.0, 5.0)),
    ("DPMSolverMultistepScheduler", 2, {}, (900.0, 5.0)),
    ("DPMSolverSinglestepScheduler", 1, TO_SMALLEST | {"solver_order": 1}, (900.0, 0.0)),
    ("DPMSolverSinglestepScheduler", 2, TO_SMALLEST, (900.0, 0.0)),
    ("DPMSolverSinglestepScheduler", 2, TO_SMALLEST | {"solver_type": "heun"}, (900.0, 0.0)),
    ("EDMDPMSolverMultistepScheduler", 2, {}, (1.0, -1.0)),
    ("EDMEulerScheduler", 1, {}, (1.0, -1.0)),
    ("EulerDiscreteScheduler", 1, {}, (900.0, 5.0)),
    ("FlowMapEulerDiscreteScheduler", 1, {}, (990.0, 10.0)),
    ("FlowMatchEulerDiscreteScheduler", 1, {}, (990.0, 10.0)),
    ("FlowMatchHeunDiscreteScheduler", 2, {}, (990.0, 10.0)),
    ("HeunDiscreteScheduler", 2, {}, (900.0, 5.0)),
    ("IPNDMScheduler", 2, {}, (0.95, 0.05)),
    ("KDPM2DiscreteScheduler", 2, {}, (900.0, 5.0)),
    ("LMSDiscreteScheduler", 4, {}, (900.0, 5.0)),
    ("PNDMScheduler", 2, {}, (900.0, 5.0)),
    ("PNDMScheduler", 2, {"skip_prk_steps": True}, (900.0, 5.0)),
    ("UniPCMultistepScheduler", 2, {}, (900.0, 5.0)),
]


@pytest.mark.parametrize(("name", "order", "options", "ends"), ORDERS, ids=lambda value: str(value))
def test_solvers_keep_their_order_on_a_rough_grid(name, order, options, ends):
    """Error against the closed form of Gaussian data, up to the last listed time, as steps are halved.

    Even-step coefficients fail here: those of PNDM and IPNDM in diffusers fall to order 1.
    """
    errors = []
    for steps in (24, 48) if name == "PNDMScheduler" else (48, 96):  # a fourth-order part of PNDM reaches float32
        table = LINEAR if "beta_start" in inspect.signature(getattr(diffusers, name).__init__).parameters else {}
        scheduler = make(name, **(table | options))
        process = Process.from_scheduler(scheduler)
        to_smallest = "final_sigmas_type" in options
        grid = rough_grid(process, *ends, steps)
        explicit(scheduler, grid[:-1] if to_smallest else grid)
        x = wide_start(process, grid[0], (16, 4))
        got = solve(scheduler, grid, x, stop=0 if to_smallest else 1) / process.scheduler_state_scale(ends[1])
        start, end = (process.alpha(t) ** 2 * VARIANCE + process.sigma(t) ** 2 for t in ends)
        errors.append(float((got - x * (end / start) ** 0.5).abs().max()))
    assert np.log2(errors[0] / errors[1]) > order - 0.5, errors


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_singlestep_of_order_three_on_a_smooth_uneven_grid(solver_type):
    errors = []
    for steps in (24, 48):
        scheduler = make(
            "DPMSolverSinglestepScheduler", **LINEAR, **TO_SMALLEST, solver_order=3, solver_type=solver_type
        )
        process = Process.from_scheduler(scheduler)
        start, end = (float(process.log_snr(time)) for time in (900.0, 0.0))
        place = np.linspace(0, 1, steps + 1)[:-1] ** 1.3
        grid = [float(process.time_of_log_snr(start + (end - start) * at)) for at in place]
        x = wide_start(process, grid[0], (16, 4))
        got = solve(explicit(scheduler, grid), grid, x, stop=0)
        before, after = (process.alpha(t) ** 2 * VARIANCE + process.sigma(t) ** 2 for t in (900.0, 0.0))
        errors.append(float((got - x * (after / before) ** 0.5).abs().max()))
    assert np.log2(errors[0] / errors[1]) > 2.5, errors


def test_the_listed_order_is_the_tested_one():
    tested = {}
    for name, order, _, _ in ORDERS:
        tested[name] = max(order, tested.get(name, 0))
    assert {name: order for name, (order, _) in FACTS.items() if order is not None} == tested


MARGINALS = ["KDPM2AncestralDiscreteScheduler", "LTXEulerAncestralRFScheduler", "SASolverScheduler"]
MARGINALS += NEED_TORCHSDE if is_torchsde_available() else []


@pytest.mark.parametrize("name", MARGINALS)
def test_stochastic_solvers_keep_the_variance_on_a_rough_grid(name):
    """20,000 draws of Gaussian data: 1 % of sampling error, and what is left of the solver's own.

    The last step lands at the mean of the clean sample, given x at the last listed time.
    """
    scheduler = make(name)
    process = Process.from_scheduler(scheduler)
    ends = {"CosineDPMSolverMultistepScheduler": (0.99, 0.25), "LTXEulerAncestralRFScheduler": (990.0, 5.0)}
    grid = rough_grid(process, *ends.get(name, (950.0, 1.0)), 400 if name.startswith("LTX") else 96)
    explicit(scheduler, grid)
    got = solve(scheduler, grid, wide_start(process, grid[0], (20000, 1)), stop=0)
    alpha, sigma = process.alpha(grid[-1]), process.sigma(grid[-1])
    expected = alpha**2 * VARIANCE**2 / (alpha**2 * VARIANCE + sigma**2)
    assert float(got.var()) == pytest.approx(float(expected), rel=0.05)


def landing(name, process, x, t, s, out, noise):
    """Where one step of a one-step stochastic sampler lands, by the forward process alone."""
    x0 = process.to_x0(out, x, t)
    if name == "TCDScheduler":  # arXiv:2402.19159, equation 9, eta = 0.3
        inner = float(np.floor(0.7 * s))
        return process.travel(process.jump(x, t, inner, out=out), inner, s, noise)
    if name == "LCMScheduler":  # arXiv:2310.04378, algorithm 3
        total = (10 * t) ** 2 + 0.25
        return process.add_noise(10 * t / total**0.5 * x0 + 0.25 / total * x, noise, s)
    if name == "FlowMatchLCMScheduler":
        return process.add_noise(x0, noise, s)
    return process.jump(x, t, s, out=out, eta=1.0, noise=noise)


@pytest.mark.parametrize(
    "name",
    [
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "EulerAncestralDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "LCMScheduler",
        "TCDScheduler",
    ],
)
def test_one_step_samplers_land_where_the_process_says(name):
    """Between the listed points, fractional ones too: an identity with `Process`, noise for noise."""
    scheduler = make(name, **({"clip_sample": False} if name.startswith("DDPM") else {}))
    process = Process.from_scheduler(scheduler)
    grid = (957.0, 640.5, 333.0, 81.25, 9.0)
    explicit(scheduler, grid)
    drawn, again = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t, s in pairwise(grid):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, scheduler.timesteps[grid.index(t)])
        out = torch.sin(x)
        scale, next_scale = process.scheduler_state_scale(t), process.scheduler_state_scale(s)
        told = scheduler.timesteps[grid.index(t)]
        got = scheduler.step(out, told, x * scale, generator=drawn, return_dict=False)[0] / next_scale
        noise = torch.randn(4, 3, dtype=torch.float32 if "Flow" in name else torch.float64, generator=again)
        x = landing(name, process, x, t, s, out, noise.double())
        torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)


# The pseudo multi-step schedulers


@pytest.mark.parametrize("points", [[0.0], [5.0, 6.0], [5.0, 5.5, 9.0], [-1.0, 3.0, 3.25, 8.0]])
def test_adams_weights_integrate_polynomials(points):
    landing = points[0] - 1.7
    weights = adams_weights(points, landing)
    for power in range(len(points)):
        mean = (landing ** (power + 1) - points[0] ** (power + 1)) / (power + 1) / (landing - points[0])
        assert sum(w * p**power for w, p in zip(weights, points, strict=True)) == pytest.approx(mean, abs=1e-9)


def test_adams_weights_of_even_steps_are_those_of_adams_and_bashforth():
    assert adams_weights([3, 4, 5, 6], 2) == pytest.approx([55 / 24, -59 / 24, 37 / 24, -9 / 24])


@pytest.mark.parametrize(
    ("options", "grid", "times"),
    [
        ({}, (900, 500), [900, 700, 700, 500, 500]),
        ({}, (900, 501, 300, 100, 7), [900, 700.5, 700.5, 501, 501, 400.5, 400.5, 300, 300, 200, 200, 100, 100, 7]),
        ({"skip_prk_steps": True}, (900, 500, 100, 7), [900, 500, 500, 100, 7]),
        ({"skip_prk_steps": True}, (900,), [900]),
        ({}, (900,), [900]),
    ],
)
def test_pndm_says_where_its_start_evaluates(options, grid, times):
    assert explicit(make("PNDMScheduler", **options), grid).timesteps.tolist() == times


@pytest.mark.parametrize("options", [{}, {"skip_prk_steps": True}])
def test_pndm_runs_a_velocity_network_as_the_noise_network_it_is(options):
    """diffusers averages velocities of different times as if they were noise, and gets another sample."""
    grid, results = (960.0, 700.0, 431.0, 250.0, 102.0, 14.0), []
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for prediction in ("epsilon", "v_prediction"):
        scheduler = explicit(make("PNDMScheduler", prediction_type=prediction, **options), grid)
        results.append(solve(scheduler, list(grid), x, stop=0))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_pndm_may_start_inside_its_grid_where_it_has_no_start_up():
    """As image to image does: the Euler step first, then as usual."""
    grid = (900.0, 700.0, 400.0, 100.0)
    scheduler = explicit(make("PNDMScheduler", skip_prk_steps=True), grid)
    process = Process.from_scheduler(scheduler)
    x = torch.ones(2, 3)
    got = scheduler.step(torch.sin(x), torch.tensor(400.0), x).prev_sample
    torch.testing.assert_close(got, process.jump(x, 400.0, 100.0, eps=torch.sin(x)))
    scheduler = explicit(make("PNDMScheduler"), grid)
    with pytest.raises(InputError, match="cannot start inside its grid, at timestep 400; set skip_prk_steps"):
        scheduler.step(x, torch.tensor(400.0), x)


# Single points


def test_midpoints_are_the_times_of_the_sigmas_between():
    grid = (960.0, 500.25, 20.0)
    scheduler = explicit(make("KDPM2DiscreteScheduler"), grid)
    process = Process.from_scheduler(scheduler)
    middle = [float(process.time_of_log_snr((process.log_snr(a) + process.log_snr(b)) / 2)) for a, b in pairwise(grid)]
    expected = [grid[0], middle[0], grid[1], middle[1], grid[2]]
    assert scheduler.timesteps.tolist() == pytest.approx(expected, rel=1e-5)
    assert scheduler.config.use_exponential_sigmas is False
    assert "_convert_to_exponential" not in vars(scheduler)


def test_ddpm_adds_no_noise_to_the_finished_sample():
    """diffusers does where its grid ends above 0, as trailing ones do; with the large variance it shows."""
    scheduler = make("DDPMScheduler", variance_type="fixed_large", clip_sample=False)
    process = Process.from_scheduler(scheduler)
    explicit(scheduler, (900, 400))
    x, out = torch.ones(1, 2, 2, 2), torch.full((1, 2, 2, 2), 0.3)
    got = scheduler.step(out, scheduler.timesteps[-1], x).prev_sample
    torch.testing.assert_close(got, process.to_x0(out, x, 400.0))


def test_lcm_runs_more_times_than_it_was_distilled_with():
    grid = tuple(np.linspace(999, 3.5, 60))
    assert trajectory(explicit(make("LCMScheduler"), grid), wavy).isfinite().all()


@pytest.mark.parametrize(
    "name", ["LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler"]
)
def test_noise_at_fractional_times(name):
    scheduler = explicit(make(name), (900.0, 400.5, 10.0))
    process = Process.from_scheduler(scheduler)
    x0, noise = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    told = scheduler.timesteps[1:2]
    assert float(told) % 1 > 0
    got = scheduler.add_noise(x0, noise, told.repeat(2))
    expected = process.add_noise(x0, noise, float(told)) * process.scheduler_state_scale(float(told)).float()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["DEISMultistepScheduler", "DPMSolverSinglestepScheduler"])
def test_flow_sigmas_of_order_one_are_euler_on_the_flow(name):
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 1}
    grid, results = (940.0, 640.0, 250.5, 50.0), []
    for scheduler in (make(name, **flow), make("FlowMatchEulerDiscreteScheduler")):
        explicit(scheduler, grid)
        x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps[:-1]:
            x = scheduler.step(torch.sin(x) - 0.3, t, x, return_dict=False)[0]
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_euler_runs_the_list_also_where_its_config_would_override_it():
    listed = explicit(make("EulerDiscreteScheduler", interpolation_type="log_linear"), (900.0, 400.5, 10.0))
    plain = explicit(make("EulerDiscreteScheduler"), (900.0, 400.5, 10.0))
    torch.testing.assert_close(listed.sigmas, plain.sigmas, rtol=0, atol=0)
