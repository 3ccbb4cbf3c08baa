"""The teacher's solvers: their order on the closed form, diffusers' schedulers, both directions, times per sample."""

from itertools import pairwise

import pytest
import torch
from analytic import FLOW, MIXTURE, PROCESSES, TRIG, VP, Gaussian, Mixture
from diffusers import HeunDiscreteScheduler, KDPM2DiscreteScheduler

from fewstep.distill.predict import Prediction
from fewstep.distill.solvers import SOLVERS, evenly
from fewstep.samplers import InputError

ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpm2": 2}
ENDS = {"vp": (300.0, 700.0), "flow": (300.0, 700.0), "trig": (0.3, 0.7), "edm": (-0.1, 0.2)}
any_process = pytest.mark.parametrize("name", PROCESSES)


def ends(name, *, forward=False):
    low, high = ENDS[name]
    t, s = torch.tensor([high, low + 0.9 * (high - low)]), torch.tensor([low, low + 0.2 * (high - low)])
    return (s.double(), t.double()) if forward else (t.double(), s.double())


def test_all_solvers_are_here():
    assert sorted(ORDERS) == SOLVERS.names()


@any_process
@pytest.mark.parametrize("solver", ORDERS)
@pytest.mark.parametrize("forward", [False, True], ids=["to data", "to noise"])
def test_order(name, solver, forward):
    """The error of n steps falls as n^-order, each sample between its own times, towards data and towards noise."""
    teacher = Mixture(PROCESSES[name], *MIXTURE)
    t, s = ends(name, forward=forward)
    x = torch.tensor([[0.3, -0.6, 1.1], [-0.9, 0.1, 0.5]], dtype=torch.float64)
    truth = teacher.map(x, t, s)
    errors = [
        (SOLVERS[solver]()(teacher.process, teacher, x, *evenly(t, s, n)) - truth).abs().max() for n in (8, 16, 32)
    ]
    for coarse, fine in pairwise(errors):
        assert float(coarse / fine) == pytest.approx(2 ** ORDERS[solver], rel=0.25)


@pytest.mark.parametrize("solver", ORDERS)
@any_process
def test_data_at_one_point_are_reached_in_one_step(name, solver):
    """The path to a point is straight in every coordinate: each solver is exact there, also onto clean data."""
    process = PROCESSES[name]
    point = torch.tensor([[0.5, -2.0], [1.0, 3.0]], dtype=torch.float64)

    def teacher(x, t):
        assert (process.sigma(t) > 0).all(), "asked at clean data"
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        return Prediction(point, (x - alpha * point) / sigma)

    t, s = ends(name)
    s[1] = process.clean_time
    x = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64)
    eps = teacher(x, t).eps
    landed = SOLVERS[solver]()(process, teacher, x, t, s)
    torch.testing.assert_close(landed, process.add_noise(point, eps, s), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("solver", "scheduler"), [("heun", HeunDiscreteScheduler), ("dpm2", KDPM2DiscreteScheduler)])
def test_second_order_steps_are_those_of_diffusers(solver, scheduler):
    """A whole run of the scheduler, which keeps x / alpha and ends on clean data."""
    theirs = scheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")
    theirs.set_timesteps(6)
    teacher = Gaussian(VP)
    levels = theirs.sigmas.double().unique().flip(0)[:-1]
    times = VP.time_of_log_snr(-2 * levels.log())
    x = torch.tensor([[0.4, -1.2]], dtype=torch.float64)
    state = x / VP.alpha(times[0])
    for time in theirs.timesteps:
        state = theirs.step(teacher(state * VP.alpha(time), time[None]).eps, time, state).prev_sample
    ours = SOLVERS[solver]()(VP, teacher, x, *times[:, None], torch.tensor([-1.0]))
    assert len(times) == 6
    torch.testing.assert_close(ours, state, rtol=1e-4, atol=1e-5)


def test_noise_alone_and_no_way_at_all():
    """From zero SNR every solver moves, by the first order where the second has no slope; t to t is no move."""
    for solver in ORDERS:
        for process, end in ((FLOW, 1000.0), (TRIG, 1.0)):
            teacher = Gaussian(process)
            x = torch.randn(2, 3, dtype=torch.float64)
            landed = SOLVERS[solver]()(process, teacher, x, torch.tensor([end, end]), torch.tensor([end, end / 2]))
            assert landed[1].isfinite().all()
            torch.testing.assert_close(landed[0], x[0])


def test_no_gradient_and_half_precision():
    teacher = Gaussian(VP)
    x = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    landed = SOLVERS["heun"]()(VP, teacher, x, torch.tensor([500.0, 400.0]), torch.tensor([300.0, 200.0]))
    assert landed.dtype == torch.float32
    assert not landed.requires_grad


def test_errors():
    x, t = torch.zeros(1, 2), torch.tensor([5.0])
    with pytest.raises(InputError, match=r"goes from a time to others; got 1 of them"):
        SOLVERS["ddim"]()(VP, Gaussian(VP), x, t)
    with pytest.raises(InputError, match=r"steps must be at least 1; got 0"):
        evenly(t, t, 0)
    with pytest.raises(InputError, match=r"unknown solver of the teacher 'huen'; did you mean 'heun'"):
        SOLVERS["huen"]
