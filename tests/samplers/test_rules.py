"""Grid rules: identity with diffusers' own grids, closed forms, and every rule on every kind of process."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import AysSchedules
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rule_cases import grid

from fewstep.samplers import InputError, Plan, Process
from fewstep.samplers.explicit import grid_adapter
from fewstep.samplers.level_rules import CAP
from fewstep.samplers.rule_grid import RuleGrid
from fewstep.samplers.rules import RULES
from fewstep.samplers.schedules import TableSchedule
from fewstep.samplers.wrapped import wrap_scheduler

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
V = {"prediction_type": "v_prediction"}
ZERO = {"rescale_betas_zero_snr": True, **V}
SPACED = (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
SCHEDULERS = {
    "linear": DDIMScheduler(),
    "scaled linear": EulerDiscreteScheduler(**SD),
    "cosine": DDIMScheduler(beta_schedule="squaredcos_cap_v2"),
    "zero SNR": DDIMScheduler(**SD, **ZERO),
    "zero SNR, capped": DPMSolverMultistepScheduler(**ZERO),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "edm": EDMEulerScheduler(),
    "svd": EulerDiscreteScheduler(timestep_type="continuous", sigma_min=0.002, sigma_max=700.0, **V),
    "trig": IPNDMScheduler(),
}


def ratio(process, times):
    return np.array([float(process.sigma(t) / process.alpha(t)) for t in times])


# Identity with diffusers


@pytest.mark.parametrize(
    ("cls", "spacing", "offset"),
    [
        *((cls, spacing, offset) for cls in SPACED for spacing in ("leading", "trailing") for offset in (0, 1)),
        *((cls, "linspace", 0) for cls in (*SPACED, DPMSolverSinglestepScheduler)),
    ],
)
def test_spacings_are_the_schedulers_own(cls, spacing, offset):
    options = {"timestep_spacing": spacing, "steps_offset": offset}
    if cls is DPMSolverSinglestepScheduler:
        options = {}  # it has linspace only
    if cls is PNDMScheduler:
        options["skip_prk_steps"] = True
    for steps in (2, 3, 7, 10, 19, 25, 50):  # 19 has halves, which round to even
        own = cls(**options)
        own.set_timesteps(steps)
        told = list(dict.fromkeys(own.timesteps.tolist()))  # Heun and PNDM evaluate twice at one time
        listed, _ = grid(cls(**options), spacing, steps)
        np.testing.assert_array_equal(np.float32(listed), np.float32(told))


def test_a_single_step_of_linspace_starts_from_noise():
    """Diffusers' starts at timestep 0, from noise that the network has never seen there."""
    own = DDIMScheduler(timestep_spacing="linspace")
    own.set_timesteps(1)
    assert own.timesteps.tolist() == [0]
    assert grid(own, "linspace", 1)[0] == (999.0,)


def test_clipped_lambda_bounds_the_first_time():
    options = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "timestep_spacing": "linspace"}
    own = DPMSolverMultistepScheduler(**options)
    own.set_timesteps(10)
    listed, _ = grid(own, "linspace", 10)
    assert listed == tuple(own.timesteps.tolist())
    assert listed[0] < 999


@pytest.mark.parametrize("betas", [SD, {}, {**SD, **ZERO}], ids=["scaled linear", "linear", "zero SNR"])
@pytest.mark.parametrize("rule", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_sigmas_of_warped_schedulers(cls, rule, betas):
    """To 1e-6 relative: what the process has at the listed times, and what DPM-Solver runs there.

    Euler is told the same times. It interpolates sigma between whole timesteps, and the process log sigma; beside zero
    SNR sigma has a slope of thousands per timestep, against which a float32 time is coarse.
    """
    for steps in (2, 5, 10, 25):
        own = cls(**betas, **{f"use_{rule}_sigmas": True})
        own.set_timesteps(steps)
        sigmas = own.sigmas[:-1].double().numpy()
        listed, scheduler = grid(cls(**betas), rule, steps)
        np.testing.assert_allclose(ratio(Process.from_scheduler(scheduler), listed), sigmas, rtol=1e-6)
        wrap_scheduler(scheduler, grid_adapter(scheduler, listed))
        scheduler.set_timesteps(steps)
        if cls is EulerDiscreteScheduler:
            np.testing.assert_allclose(own.timesteps.numpy(), listed, rtol=1e-6, atol=1e-4)
            table = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().double().numpy()
            sigmas = np.interp(np.float32(listed), np.arange(1000), table)
        tolerance = 5e-5 if cls is EulerDiscreteScheduler and "rescale_betas_zero_snr" in betas else 1e-6
        np.testing.assert_allclose(scheduler.sigmas[:-1].double().numpy(), sigmas, rtol=tolerance)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("rule", ["linspace", "karras", "exponential", "beta"])
def test_flow_matching_as_its_scheduler(rule, shift):
    for steps in (1, 2, 7, 10):
        own = FlowMatchEulerDiscreteScheduler(
            shift=shift, **({} if rule == "linspace" else {f"use_{rule}_sigmas": True})
        )
        own.set_timesteps(steps)
        listed, _ = grid(FlowMatchEulerDiscreteScheduler(shift=shift), rule, steps)
        np.testing.assert_allclose(listed, own.timesteps.double().numpy(), rtol=1e-6)


def test_flux_gives_the_scheduler_trailing_sigmas_and_a_shift():
    mu, steps = 0.9, 6
    own = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    own.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    listed, _ = grid(own, "trailing", steps, shift=math.exp(mu))
    np.testing.assert_allclose(listed, own.timesteps.double().numpy(), rtol=1e-6)


@pytest.mark.parametrize("cls", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("sigma_schedule", ["karras", "exponential"])
def test_edm_schedulers_own_grid_is_linspace(cls, sigma_schedule):
    own = cls(sigma_schedule=sigma_schedule)
    own.set_timesteps(9)
    sigmas = own.sigmas[:-1].double().numpy()
    listed, _ = grid(cls(sigma_schedule=sigma_schedule), "linspace", 9)
    np.testing.assert_allclose(np.exp(4 * np.array(listed)), sigmas, rtol=1e-5)
    by_name, _ = grid(cls(), sigma_schedule, 9)
    np.testing.assert_allclose(np.exp(4 * np.array(by_name)), sigmas, rtol=1e-5)


# Closed forms


@pytest.mark.parametrize(("table", "name"), [("sd1", "StableDiffusion"), ("sdxl", "StableDiffusionXL")])
def test_align_your_steps_is_the_published_table(table, name):
    listed, scheduler = grid(EulerDiscreteScheduler(**SD), "align-your-steps", 10, table=table)
    assert listed == tuple(AysSchedules[f"{name}Timesteps"])
    published = AysSchedules[f"{name}Sigmas"]
    np.testing.assert_allclose(ratio(Process.from_scheduler(scheduler), listed), published[:-1], atol=6e-3)


def test_align_your_steps_on_stable_video_diffusion():
    listed, scheduler = grid(SCHEDULERS["svd"], "align-your-steps", 10, table="svd")
    sigmas = ratio(Process.from_scheduler(scheduler), listed)
    np.testing.assert_allclose(sigmas, AysSchedules["StableDiffusionVideoSigmas"][:-1], rtol=1e-9)


@pytest.mark.parametrize("steps", [5, 20])
def test_align_your_steps_interpolates_log_sigma(steps):
    """Eleven levels, the last the cleanest of the network (0.002 in the paper's table), at steps + 1 even places."""
    listed, scheduler = grid(SCHEDULERS["svd"], "align-your-steps", steps, table="svd")
    levels = np.log([*AysSchedules["StableDiffusionVideoSigmas"][:-1], 0.002])
    expected = np.exp(np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, 11), levels))[:-1]
    np.testing.assert_allclose(ratio(Process.from_scheduler(scheduler), listed), expected, rtol=1e-6)


def test_align_your_steps_at_the_same_snr_elsewhere():
    """A flow process starts at pure noise; from there on its SNRs are those of Stable Diffusion."""
    listed, scheduler = grid(FlowMatchEulerDiscreteScheduler(), "align-your-steps", 10)
    assert listed[0] == 1000
    own, vp = grid(EulerDiscreteScheduler(**SD), "align-your-steps", 10)
    np.testing.assert_allclose(
        ratio(Process.from_scheduler(scheduler), listed[1:]), ratio(Process.from_scheduler(vp), own[1:]), rtol=1e-9
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_logsnr_uniform_has_equal_steps_to_the_cleanest_time(name):
    listed, scheduler = grid(SCHEDULERS[name], "logsnr-uniform", 8)
    process = Process.from_scheduler(scheduler)
    values = [max(CAP, float(process.log_snr(t))) for t in listed]
    (step,) = {round(b - a, 6) for a, b in pairwise(values)}
    everything, _ = grid(SCHEDULERS[name], "logsnr-uniform", 9, endpoint=True)
    assert everything[:-1] == pytest.approx(listed, rel=1e-9)
    assert values[-1] + step == pytest.approx(float(process.log_snr(everything[-1])), abs=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_power_of_one_is_linspace_and_of_two_quadratic(name):
    for steps in (1, 2, 7, 19, 30):
        assert grid(SCHEDULERS[name], "power", steps)[0] == grid(SCHEDULERS[name], "linspace", steps)[0]
        squares, _ = grid(SCHEDULERS[name], "power", steps, exponent=2.0)
        assert squares == grid(SCHEDULERS[name], "quadratic", steps)[0]


def test_the_quadratic_grid_of_ddim():
    """The released code: squares of even numbers up to sqrt(0.8 T), T = 1000."""
    listed, _ = grid(DDIMScheduler(), "quadratic", 10, first=800, round=False)
    np.testing.assert_allclose(listed[::-1], np.linspace(0, math.sqrt(800), 10) ** 2, rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("rule", sorted({"linspace", "power", "karras", "exponential", "beta"}))
def test_first_and_last_bound_the_grid(name, rule):
    whole, _ = grid(SCHEDULERS[name], rule, 9)
    listed, _ = grid(SCHEDULERS[name], rule, 5, first=whole[1], last=whole[-2], round=False, endpoint=True)
    assert (listed[0], listed[-1]) == pytest.approx((whole[1], whole[-2]), rel=1e-9)


@pytest.mark.parametrize("rho", [3.0, 7.0])
def test_karras_is_even_in_the_root_of_sigma(rho):
    listed, scheduler = grid(DDIMScheduler(), "karras", 6, rho=rho)
    roots = ratio(Process.from_scheduler(scheduler), listed) ** (1 / rho)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-7)


def test_beta_of_one_and_one_is_even_in_sigma():
    listed, scheduler = grid(DDIMScheduler(), "beta", 6, alpha=1.0, beta=1.0)
    sigmas = ratio(Process.from_scheduler(scheduler), listed)
    np.testing.assert_allclose(np.diff(sigmas), np.diff(sigmas)[0], rtol=1e-7)


# Zero terminal SNR


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_zero_snr_rule_is_diffusers_own_recipe(cls):
    own = cls(timestep_spacing="trailing", **ZERO)
    own.set_timesteps(5)
    listed, scheduler = grid(cls(**V), "trailing-zero-snr", 5)
    assert listed == tuple(own.timesteps.tolist())
    assert listed[0] == 999
    assert torch.equal(scheduler.alphas_cumprod, own.alphas_cumprod)
    assert scheduler.alphas_cumprod[-1] <= 2**-24


def test_zero_snr_refuses_epsilon():
    with pytest.raises(InputError, match="got prediction_type='epsilon': epsilon is undefined at SNR 0, use the rule"):
        grid(DDIMScheduler(), "trailing-zero-snr", 5)


def test_zero_snr_names_the_schedulers_that_have_the_option():
    message = "PNDMScheduler has no rescale_betas_zero_snr; use one of .*DDIMScheduler.*UniPCMultistepScheduler$"
    with pytest.raises(InputError, match=message):
        grid(PNDMScheduler(**V), "trailing-zero-snr", 5)


def test_any_rule_refuses_epsilon_at_zero_snr():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(InputError, match="undefined at timestep 999, where the SNR is zero; use a v_prediction"):
        grid(scheduler, "karras", 5)
    assert grid(scheduler, "karras", 5, first=998)[0][0] == 998


# Every rule on every process


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("rule", RULES.names())
def test_every_rule_on_every_process(rule, name):
    scheduler = SCHEDULERS[name]
    if rule == "trailing-zero-snr" and "zero" not in name:
        return  # what it refuses is tested by itself
    process = Process.from_scheduler(scheduler)
    for steps in (1, 2, 3, 5, 10, 50):
        if (rule, steps) == ("quadratic", 50) and isinstance(process.schedule, TableSchedule):
            continue  # more than fit, see below
        listed, made = grid(scheduler, rule, steps)
        assert len(listed) == steps
        assert all(before > after for before, after in pairwise(np.float32(listed)))
        assert listed[0] <= process.time_range.noisiest
        assert float(Process.from_scheduler(made).sigma(listed[-1])) > 0
        if rule != "leading":
            assert listed[0] == pytest.approx(process.time_range.noisiest, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULERS)),
    rule=st.sampled_from(sorted(set(RULES.names()) - {"trailing-zero-snr"})),
    steps=st.integers(1, 300),
    whole=st.sampled_from([None, False]),
)
def test_a_grid_decreases_or_says_how_many_steps_do(name, rule, steps, whole):
    try:
        listed, _ = grid(SCHEDULERS[name], rule, steps, round=whole)
    except InputError as error:
        fits = int(re.fullmatch(rf"{steps} steps repeat a timestep; at most (\d+) fit .*", str(error))[1])
        steps, listed = fits, grid(SCHEDULERS[name], rule, fits, round=whole)[0]
    assert len(listed) == steps
    assert all(before > after for before, after in pairwise(listed))


# Errors


def test_repeated_timesteps_say_how_many_steps_fit():
    message = "^50 steps repeat a timestep; at most 45 fit this rule here: ask for no more, or set the option 'round'"
    with pytest.raises(InputError, match=message):
        grid(DDIMScheduler(), "quadratic", 50)
    assert len(grid(DDIMScheduler(), "quadratic", 45)[0]) == 45
    assert len(grid(DDIMScheduler(), "quadratic", 50, round=False)[0]) == 50


@pytest.mark.parametrize(
    ("scheduler", "rule", "options", "message"),
    [
        (DDIMScheduler(), "linspace", {"first": 10, "last": 20}, "'first' must be noisier than 'last'; got first 10"),
        (DDIMScheduler(), "trailing", {"first": 2000}, "^'first' must be at least 0 and at most 999 .*; got 2000"),
        (
            FlowMatchEulerDiscreteScheduler(),
            "linspace",
            {"last": 0},
            "'last' must be above 0 and at most 1000 .*; got 0",
        ),
        (DDIMScheduler(steps_offset=1), "leading", {"offset": 300}, "gives timestep 1100, and this process has those"),
        (EDMEulerScheduler(), "linspace", {"round": True}, "no whole timesteps to round to; leave the option 'round'"),
        (EDMEulerScheduler(), "leading", {"offset": 1}, "only a table of timesteps has an offset; got 1: leave"),
        (DDIMScheduler(), "linspace", {"shift": 2.0}, "only a flow-matching process has a shift"),
        (DDIMScheduler(**SD), "align-your-steps", {"table": "svd"}, "'svd' has noise levels 54.5 to 0.034, and this"),
        (
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "linspace",
            {},
            r"shifts by resolution; give the rule the option 'shift', exp\(mu\)",
        ),
        (
            FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            "karras",
            {},
            "time runs towards data on this scheduler",
        ),
    ],
)
def test_what_cannot_be_is_refused(scheduler, rule, options, message):
    with pytest.raises(InputError, match=message):
        grid(scheduler, rule, 5, **options)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"rule": "kerras"}, "unknown grid rule 'kerras'; did you mean 'karras'"),
        ({"rule": "karras", "options": {"roh": 5}}, "unknown option of rule 'karras' 'roh'; did you mean 'rho'"),
        ({"rule": "karras", "options": {"rho": -1}}, "option 'rho' of rule 'karras': Input should be greater than 0"),
        ({"rule": "align-your-steps", "options": {"table": "sd3"}}, "option 'table' of rule 'align-your-steps'"),
        ({"rule": "karras", "steps": 0}, "steps: Input should be greater than or equal to 1; got 0"),
    ],
)
def test_a_plan_with_a_wrong_rule(part, message):
    data = {"fewstep_plan": 1, "grid": {"type": "rule", "steps": 4} | part}
    with pytest.raises(InputError, match=message) as caught:
        Plan.from_json(data)
    assert "\n" not in str(caught.value)


def test_parts_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        RuleGrid(rule="karras", steps=4).steps = 5
