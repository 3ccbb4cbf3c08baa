"""The student's jumps: their boundaries, diffusers' consistency schedulers, landing anywhere."""

import pytest
import torch
from analytic import EDM, PROCESSES, VP, Gaussian
from diffusers import CMStochasticIterativeScheduler, LCMScheduler

from fewstep.distill.jumps import JUMPS, CMBoundary, Landing, LCMBoundary
from fewstep.distill.predict import Prediction
from fewstep.samplers import InputError

TIMES = torch.tensor([0.0, 19.0, 500.0, 999.0], dtype=torch.float64)


def states(count=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 2, 3, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("name", PROCESSES)
def test_landing_is_the_state_where_it_is_and_the_truth_at_data(name):
    process = PROCESSES[name]
    x0, eps, *_ = states()
    t = process.from_uniform(torch.tensor([0.2, 0.4, 0.8, 0.9], dtype=torch.float64))
    clean = torch.full_like(t, process.clean_time)
    x = process.add_noise(x0, eps, t)
    torch.testing.assert_close(Landing()(process, x, t, t, Prediction(x0, eps)), x)
    torch.testing.assert_close(Landing()(process, x, t, clean, Prediction(x0, eps)), x0)
    torch.testing.assert_close(
        Landing()(process, x, t, t.flip(0), Prediction(x0, eps)), process.add_noise(x0, eps, t.flip(0))
    )


@pytest.mark.parametrize("scaling", [10.0, 1.0])
def test_lcm_is_what_the_scheduler_deploys(scaling):
    scheduler = LCMScheduler(timestep_scaling=scaling)
    x, x0, eps, _ = states()
    ours = LCMBoundary(timestep_scaling=scaling)(VP, x, TIMES, TIMES * 0, Prediction(x0, eps))
    for row, time in enumerate(TIMES.tolist()):
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(time)
        torch.testing.assert_close(ours[row], c_skip * x[row] + c_out * x0[row])
    torch.testing.assert_close(ours[0], x[0])


def test_cm_is_what_the_scheduler_deploys():
    """diffusers has the network F; x0 is EDM's combination of it."""
    scheduler = CMStochasticIterativeScheduler()
    x, network, *_ = states()
    sigma = torch.tensor([0.002, 0.3, 5.0, 80.0], dtype=torch.float64)
    scale = (sigma**2 + 0.25).rsqrt().view(4, 1, 1)
    x0 = 0.25 * scale**2 * x + 0.5 * sigma.view(4, 1, 1) * scale * network
    t = sigma.log() / 4
    ours = CMBoundary()(EDM, x, t, t, Prediction(x0, x0))
    for row in range(4):
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition(sigma[row])
        torch.testing.assert_close(ours[row], c_skip * x[row] + c_out * network[row])
    torch.testing.assert_close(ours[0], x[0])


@pytest.mark.parametrize("name", JUMPS.names())
def test_jumps_are_differentiable_and_at_least_float32(name):
    process = EDM if name == "cm" else VP
    t = process.from_uniform(torch.full((4,), 0.5))
    x0 = torch.ones(4, 2, requires_grad=True)
    landed = JUMPS[name]()(process, torch.zeros(4, 2, dtype=torch.bfloat16), t, t, Prediction(x0, x0))
    assert landed.dtype == torch.float32
    landed.sum().backward()
    assert x0.grad.abs().min() > 0


def test_cm_needs_alpha_one():
    x, t = torch.zeros(1, 2), torch.tensor([5.0])
    with pytest.raises(InputError, match=r"the jump 'cm' is for alpha = 1 \(EDM\), and here it is less at time 5; use"):
        CMBoundary()(VP, x, t, t, Gaussian(VP)(x, t))
