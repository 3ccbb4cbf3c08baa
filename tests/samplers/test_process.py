"""Process against closed forms and its own inverses, and what it refuses."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from process_cases import PROCESSES, ZERO_TABLE, any_process, close, column, draws

from fewstep.samplers import InputError
from fewstep.samplers.prediction import Epsilon
from fewstep.samplers.process import Process
from fewstep.samplers.schedules import TableSchedule

# Closed forms


@any_process
def test_the_posterior_mean_of_gaussian_data_is_recovered(process):
    """For x0 ~ N(m, c^2) the ideal output is known, and the conversions give E[x0 | x] and E[eps | x]."""
    mean, std = 0.3, 0.7
    t = process.from_uniform(torch.tensor([0.2, 0.5, 0.8]))
    alpha, sigma = column(process.alpha(t)), column(process.sigma(t))
    (x,) = draws(count=1)
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    x0 = mean + gain * (x - alpha * mean)
    eps = sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
    out = process.target(x0, eps, t)
    close(process.to_x0(out, x, t), x0, 1e-9)
    close(process.to_eps(out, x, t), eps, 1e-9)
    close(process.to_v(out, x, t), alpha * eps - sigma * x0, 1e-9)
    close(process.from_x0(x0, x, t), out, 1e-9)
    close(process.convert(out, x, t, process.prediction), out, 1e-9)
    close(process.convert(out, x, t, "flow_prediction"), eps - x0, 1e-9)


@any_process
def test_jumps_solve_the_gaussian_ode_to_first_order(process):
    """For N(0, c^2) data the ODE keeps x / sqrt(alpha^2 c^2 + sigma^2), and DDIM is of order 1."""
    std = 0.5

    def spread(t):
        return (process.alpha(t) ** 2 * std**2 + process.sigma(t) ** 2).sqrt()

    def error(steps):
        grid = process.from_uniform(torch.linspace(0.7, 0.3, steps + 1, dtype=torch.float64))
        x = spread(grid[0]) * torch.ones(1, 1, dtype=torch.float64)
        for t, s in pairwise(grid):
            x = process.jump(x, t, s, x0=process.alpha(t) * std**2 / spread(t) ** 2 * x)
        return (x / spread(grid[-1]) - 1).abs().item()

    assert error(128) < 0.05
    assert math.log2(error(64) / error(128)) == pytest.approx(1, abs=0.15)


@any_process
def test_travel_keeps_the_marginal_and_composes(process):
    t, m, s = process.from_uniform(torch.tensor([0.2, 0.5, 0.9]))
    x, first, second = draws(count=3)
    zero = torch.zeros_like(x)
    r = process.alpha(s) / process.alpha(t)
    close(process.travel(x, t, s, zero), r * x, 1e-9)
    # Var(x_s) = r^2 sigma_t^2 + std^2 must be sigma_s^2, in one move and in two.
    std = process.travel(zero, t, s, torch.ones_like(x))
    close((r * process.sigma(t)) ** 2 + std**2, (process.sigma(s) ** 2).expand_as(x), 1e-9)
    early = process.alpha(s) / process.alpha(m) * process.travel(zero, t, m, torch.ones_like(x))
    late = process.travel(zero, m, s, torch.ones_like(x))
    close(early**2 + late**2, std**2, 1e-9)
    close(process.travel(x, t, t, first), x, 1e-6)
    twice = process.travel(process.travel(x, t, m, first), m, s, second)
    close(twice, r * x + early * first + late * second, 1e-9)


def test_travel_starts_from_clean_data_and_stays_at_zero_snr():
    process = PROCESSES["v"]
    x, noise = draws()
    close(process.travel(x, process.clean_time, 5, noise), process.add_noise(x, noise, 5), 1e-12)
    close(process.travel(x, 4, 11, noise), noise, 1e-12)
    close(process.travel(x, 11, 11, noise), x, 1e-12)


@any_process
def test_ancestral_jump_has_the_posterior_variance(process):
    """Eta = 1 leaves the marginal of x_s: variance sigma_s^2 given x0, over eps and the noise."""
    t, s = process.from_uniform(torch.tensor([0.8, 0.4]))
    zero, one = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    from_eps = process.jump(process.sigma(t) * one, t, s, x0=zero, eta=1.0, noise=zero)
    from_noise = process.jump(zero, t, s, x0=zero, eta=1.0, noise=one)
    close(from_eps**2 + from_noise**2, (process.sigma(s) ** 2).expand_as(one), 1e-9)
    # The transition back, x_s -> x_t, has covariance r sigma_s^2 with x_t: detailed balance of the posterior.
    close(from_eps * process.sigma(t), process.alpha(t) / process.alpha(s) * process.sigma(s) ** 2 * one, 1e-9)


# Properties


@any_process
def test_log_snr_falls_with_noise_and_its_inverse_is_exact(process):
    t = process.from_uniform(torch.linspace(0.01, 0.99, 77, dtype=torch.float64))
    log_snr = process.log_snr(t)
    assert (log_snr.diff() < 0).all()
    close(process.time_of_log_snr(log_snr), t, 1e-9)
    assert process.log_snr(process.clean_time) == math.inf
    assert process.time_of_log_snr(math.inf) == process.clean_time


def test_a_table_whose_last_entry_is_less_noisy_than_its_neighbour():
    """2^-24 at the end of linear betas rescaled to zero SNR, as Euler, DPM-Solver and UniPC have it."""
    process = Process.from_scheduler(diffusers.UniPCMultistepScheduler(rescale_betas_zero_snr=True))
    assert process.log_snr(999) > process.log_snr(998)
    t = torch.arange(999)
    close(process.time_of_log_snr(process.log_snr(t)), t, 1e-9)
    with pytest.raises(InputError, match="cannot travel to time 999"):
        process.travel(torch.zeros(1, 1), 998, 999, torch.zeros(1, 1))


def test_inverse_clamps_to_the_ends_of_a_table():
    epsilon, v = PROCESSES["epsilon"], PROCESSES["v"]
    assert epsilon.time_of_log_snr(500.0) == 0
    assert epsilon.time_of_log_snr(-500.0) == 10
    assert epsilon.time_of_log_snr(-math.inf) == 10
    assert v.time_of_log_snr(-math.inf) == 11
    assert 10.99 < v.time_of_log_snr(-30.0) < 11


def test_alpha_is_linear_into_zero_terminal_snr():
    process = PROCESSES["v"]
    close(process.alpha(10.25), 0.75 * process.alpha(10), 1e-12)
    assert (process.log_snr(torch.linspace(9, 11, 50)).diff() < 0).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(PROCESSES)),
    u=st.floats(0.02, 0.97),
    w=st.floats(0.02, 0.97),
    seed=st.integers(0, 99),
)
def test_round_trips(name, u, w, seed):
    process = PROCESSES[name]
    t, s = process.from_uniform(u), process.from_uniform(w)
    x0, eps = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = process.add_noise(x0, eps, t)
    out = process.target(x0, eps, t)
    close(process.to_x0(out, x, t), x0, 1e-8)
    close(process.to_eps(out, x, t), eps, 1e-8)
    close(process.from_x0(x0, x, t), out, 1e-8)
    landed = process.add_noise(x0, eps, s)
    for known in ({"out": out}, {"x0": x0}, {"eps": eps}, {"x0": x0, "eps": eps}):
        close(process.jump(x, t, s, **known), landed, 1e-7)
    close(process.jump(x, t, process.clean_time, out=out), x0, 1e-8)


@any_process
def test_a_time_per_sample_equals_one_sample_at_a_time(process):
    x, out, noise = draws(count=3)
    t, s = process.from_uniform(torch.tensor([[0.3, 0.5, 0.6], [0.4, 0.7, 0.9]]).reshape(-1)).view(2, 3)

    def calls(x, out, noise, t, s):
        return [
            process.add_noise(x, out, t),
            process.to_x0(out, x, t),
            process.to_eps(out, x, t),
            process.from_x0(out, x, t),
            process.jump(x, t, s, out=out),
            process.jump(x, s, t, out=out, eta=0.5, noise=noise),
            process.travel(x, t, s, noise),
        ]

    together = calls(x, out, noise, t, s)
    for i in range(3):
        alone = calls(x[i : i + 1], out[i : i + 1], noise[i : i + 1], t[i].item(), s[i])
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[i : i + 1], b)


@any_process
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_rounds_once(process, dtype):
    x, out = draws(dtype=dtype)
    t, s = process.from_uniform(torch.tensor([0.5, 0.3]))
    exact = process.jump(x.double(), t, s, out=out.double())
    ours = process.jump(x, t, s, out=out)
    assert ours.dtype == dtype
    assert process.alpha(t).dtype == torch.float64
    step = torch.finfo(dtype).eps
    scale = max(exact.abs().max().item(), 1.0)
    assert (ours.double() - exact).abs().max() <= (0.51 if dtype != torch.float32 else 4) * step * scale
    assert process.to_x0(out.to(torch.float16), x.float(), t).dtype == torch.float32


def test_coefficients_differentiate_in_time():
    for process in PROCESSES.values():
        t = process.from_uniform(torch.tensor([0.33, 0.61], dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(lambda t, process=process: process.sigma(t) + 2 * process.alpha(t), t)
    process, (x, out) = PROCESSES["trig"], draws()
    t = torch.tensor(0.4, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda t: process.add_noise(x, out, t), (t,), (torch.ones_like(t),))
    close(tangent, math.pi / 2 * (process.alpha(t) * out - process.sigma(t) * x), 1e-9)


def test_a_process_compares_copies_and_pickles():
    for process in PROCESSES.values():
        process.alpha(process.from_uniform(0.5))
        assert pickle.loads(pickle.dumps(process)) == process
        assert copy.deepcopy(process) == process
        assert hash(process) == hash(copy.deepcopy(process))
    assert len(set(PROCESSES.values())) == len(PROCESSES)


def test_subclasses_and_moved_tables_are_recognised():
    class Mine(diffusers.DDIMScheduler):
        pass

    assert Process.from_scheduler(Mine()) == Process.from_scheduler(diffusers.DDPMScheduler())


@any_process
def test_times_on_an_accelerator_are_never_waited_for(process):
    """On the meta device every look at a value raises, as every such look would stall an accelerator."""
    (x, out, noise), t = (v.to("meta") for v in draws(count=3)), torch.empty(3, device="meta")
    for time in (t, t[0], t[:1]):
        moved = [
            process.to_x0(out, x, time),
            process.from_x0(out, x, time),
            process.jump(x, time, process.clean_time, out=out),
            process.jump(x, time, time, out=out, eta=0.5, noise=noise),
            process.travel(x, time, time, noise),
        ]
        assert all(value.device.type == "meta" and value.shape == x.shape for value in moved)
        for value in (process.time_of_log_snr(time), process.from_uniform(time), process.input_scale(time)):
            assert value.device.type == "meta"
            assert value.shape == time.shape
    assert process.to_x0(out, x, process.from_uniform(0.5)).device.type == "meta"


@pytest.mark.gpu
@any_process
def test_cuda_equals_cpu(process):
    x, out, noise = draws(count=3)
    t = process.from_uniform(torch.tensor([0.3, 0.5, 0.6]))
    s = process.from_uniform(torch.tensor([0.4, 0.7, 0.9]))
    for time, place in ((t, t.cuda()), (t[0], t[0])):
        close(process.to_x0(out.cuda(), x.cuda(), place).cpu(), process.to_x0(out, x, time), 1e-12)
    there = process.travel(x.cuda(), t.cuda(), s.cuda(), noise.cuda())
    close(there.cpu(), process.travel(x, t, s, noise), 1e-12)
    close(process.time_of_log_snr(process.log_snr(t.cuda())).cpu(), t, 1e-9)
    assert process.travel(x.cuda(), s.cuda(), t.cuda(), noise.cuda()).isnan().all()
    assert process.alpha(torch.full((2,), math.nan).cuda()).isnan().all()


# Errors


def fails(message: str, call) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value) == message


def test_errors_of_schedulers():
    fails(
        "unknown scheduler AmusedScheduler; give pipe.scheduler if that is one of diffusers' "
        "variance-preserving, flow-matching or EDM schedulers, or build Process(schedule, prediction) "
        "by hand",
        lambda: Process.from_scheduler(diffusers.AmusedScheduler(mask_token_id=5)),
    )
    fails(
        "prediction_type='flow_prediction' needs use_flow_sigmas=True in the scheduler's config",
        lambda: Process.from_scheduler(diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction")),
    )
    fails(
        "use_flow_sigmas=True with prediction_type='v_prediction' mixes two processes; "
        "set prediction_type='flow_prediction'",
        lambda: Process.from_scheduler(
            diffusers.UniPCMultistepScheduler(prediction_type="v_prediction", use_flow_sigmas=True)
        ),
    )
    fails(
        "EDMDPMSolverMultistepScheduler cannot precondition prediction_type='sample'; set 'epsilon' or 'v_prediction'",
        lambda: Process.from_scheduler(diffusers.EDMDPMSolverMultistepScheduler(prediction_type="sample")),
    )
    with pytest.raises(InputError, match="unknown prediction type 'epsilom'; did you mean 'epsilon'"):
        Process.from_scheduler(diffusers.DDIMScheduler(prediction_type="epsilom"))
    with pytest.raises(InputError, match=r"must lie inside \(0, 1\); got 1.0 at index 0, mend the betas"):
        Process.from_scheduler(diffusers.DDIMScheduler(trained_betas=[0.0, 0.1, 0.2]))
    with pytest.raises(InputError, match=r"must not increase; got 0.6 after 0.5 at index 2, mend the betas"):
        TableSchedule((0.9, 0.5, 0.6, 0.4))
    fails("alphas_cumprod has 2 values; a noise schedule needs at least 3", lambda: TableSchedule((0.9, 0.5)))


def test_errors_of_times():
    x, out = draws()
    vp, flow, edm = PROCESSES["v"], PROCESSES["flow"], PROCESSES["edm"]
    fails("time 11.5 is outside 0 to 11, or -1 for clean data", lambda: vp.alpha(11.5))
    fails("time -0.5 is outside 0 to 11, or -1 for clean data", lambda: vp.alpha(torch.tensor([3, -0.5])))
    fails("time nan is outside 0 to 1000", lambda: flow.log_snr(math.nan))
    fails("time 1001 is outside 0 to 1000", lambda: flow.to_x0(out, x, 1001))
    fails(
        "time inf is outside any log(sigma)/4 below infinity, -infinity for clean data",
        lambda: edm.sigma(math.inf),
    )
    fails("time 1 is outside 0 to below 1", lambda: PROCESSES["arctan edm"].sigma(1.0))
    fails("log-SNR is nan; give a number", lambda: vp.time_of_log_snr(math.nan))
    fails("fraction 1.5 is outside 0 to 1", lambda: vp.from_uniform(1.5))
    fails(
        "a time is one number or one per sample; got a tensor of shape (2, 2)",
        lambda: vp.alpha(torch.zeros(2, 2)),
    )
    fails(
        "got 2 times for tensors of shape (3, 2, 4, 4); give one, or one per sample",
        lambda: vp.add_noise(x, out, torch.tensor([1, 2])),
    )
    fails(
        "cannot travel to time 300, which is less noisy than the start; use jump",
        lambda: flow.travel(x, 500.0, torch.tensor([600.0, 300.0, 500.0]), out),
    )
    fails(
        "only a flow-matching process has a shift; this one is not, leave the shift out",
        lambda: vp.with_shift(3.0),
    )
    fails("shift must be positive and finite; got 0", lambda: flow.with_shift(0))


def test_errors_of_tensors():
    x, out = draws()
    flow = PROCESSES["flow"]
    fails(
        "tensors of one step must have one shape; got (3, 4, 4, 4) beside (3, 2, 4, 4), drop a learned variance first",
        lambda: flow.to_x0(torch.cat([out, out], 1), x, 500),
    )
    fails("tensors must be floating point; got torch.uint8", lambda: flow.add_noise(x.byte(), out, 500))


def test_errors_of_what_is_not_determined():
    x, out = draws()
    zero_snr = Process(TableSchedule(ZERO_TABLE), Epsilon())
    mend = "use a v_prediction network or another time"
    fails(
        f"epsilon does not determine x0 at time 11, where the SNR is zero; {mend}",
        lambda: zero_snr.to_x0(out, x, torch.tensor([3, 11, 5])),
    )
    fails(
        f"epsilon does not determine the landing at time 11, where the SNR is zero; {mend}",
        lambda: zero_snr.jump(x, 11, 7, out=out),
    )
    fails(
        f"epsilon does not determine v_prediction at time 1000, where the SNR is zero; {mend}",
        lambda: PROCESSES["flow epsilon"].to_v(out, x, 1000),
    )
    fails(
        f"sample does not determine eps at time -1, where there is no noise; {mend}",
        lambda: PROCESSES["sample"].to_eps(out, x, -1),
    )
    # What is determined all the same
    assert torch.equal(zero_snr.to_eps(out, x, 11), out)
    close(PROCESSES["v"].to_x0(out, x, 11), -out, 1e-12)
    close(PROCESSES["sample"].jump(x, 11, -1, out=out), out, 1e-12)


def test_errors_of_jump():
    x, out = draws()
    flow = PROCESSES["flow"]
    fails("jump needs out, x0, eps, or both x0 and eps; got none", lambda: flow.jump(x, 500, 300))
    fails(
        "jump needs out, x0, eps, or both x0 and eps; got out and x0",
        lambda: flow.jump(x, 500, 300, out=out, x0=out),
    )
    fails("eta must be 0 to 1; got 1.5", lambda: flow.jump(x, 500, 300, out=out, eta=1.5, noise=x))
    fails("noise goes with eta > 0; got eta=0.5 without noise", lambda: flow.jump(x, 500, 300, out=out, eta=0.5))
    fails("noise goes with eta > 0; got eta=0.0 with noise", lambda: flow.jump(x, 500, 300, out=out, noise=x))
    fails(
        "cannot jump with eta > 0 to time 700, which is noisier than the start; use travel",
        lambda: flow.jump(x, 500, 700, out=out, eta=0.5, noise=x),
    )
