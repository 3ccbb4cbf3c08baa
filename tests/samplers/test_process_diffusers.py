"""Process against every diffusers scheduler that has one: tables, forward process, conversions and steps."""

from __future__ import annotations

from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from process_cases import close, column, draws

from fewstep.samplers import InputError
from fewstep.samplers.process import Process

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__", "ignore:`algorithm_types dpmsolver")

COMMON = ("linear", "scaled_linear", "squaredcos_cap_v2")
DDPM_BETAS = (*COMMON, "laplace", "sigmoid")

EPS_V = ("epsilon", "v_prediction")
EPS_V_X = (*EPS_V, "sample")
# name -> (beta schedules, knows rescale_betas_zero_snr)
VP = {
    "CogVideoXDDIMScheduler": (COMMON, True),
    "CogVideoXDPMScheduler": (COMMON, True),
    "DDIMInverseScheduler": (COMMON, True),
    "DDIMParallelScheduler": (COMMON, True),
    "DDIMScheduler": (COMMON, True),
    "DDPMParallelScheduler": (DDPM_BETAS, True),
    "DDPMScheduler": (DDPM_BETAS, True),
    "DEISMultistepScheduler": (COMMON, False),
    "DPMSolverMultistepInverseScheduler": (COMMON, False),
    "DPMSolverMultistepScheduler": (COMMON, True),
    "DPMSolverSinglestepScheduler": (COMMON, False),
    "LCMScheduler": (COMMON, True),
    "PNDMScheduler": (COMMON, False),
    "SASolverScheduler": (COMMON, False),
    "TCDScheduler": (COMMON, True),
    "UniPCMultistepScheduler": (COMMON, True),
}
K_DIFFUSION = {
    "DPMSolverSDEScheduler": (COMMON, False),
    "EulerAncestralDiscreteScheduler": (COMMON, True),
    "EulerDiscreteScheduler": (COMMON, True),
    "HeunDiscreteScheduler": ((*COMMON, "exp"), False),
    "KDPM2AncestralDiscreteScheduler": (COMMON, False),
    "KDPM2DiscreteScheduler": (COMMON, False),
    "LMSDiscreteScheduler": (COMMON, False),
}
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
FLOW_BY_CONFIG = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
NEEDS_TORCHSDE = {"DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"}

TABLES = [
    (name, {"beta_schedule": betas, "rescale_betas_zero_snr": zero} if zero else {"beta_schedule": betas})
    for name, (schedules, rescales) in {**VP, **K_DIFFUSION}.items()
    for betas in schedules
    for zero in ((False, True) if rescales else (False,))
]


def make(name: str, **config: object):
    if name in NEEDS_TORCHSDE:
        pytest.importorskip("torchsde")
    return getattr(diffusers, name)(**config)


# Second implementations: tables and forward process


@pytest.mark.parametrize(
    ("name", "config"), TABLES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_tables_equal_the_schedulers_own(name, config):
    scheduler = make(name, **config)
    process = Process.from_scheduler(scheduler)
    t = torch.arange(1000)
    table = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(process.alpha(t), table.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(process.sigma(t), (1 - table).sqrt(), rtol=1e-12, atol=0)
    assert process.time_range == (0, 999)
    if config.get("rescale_betas_zero_snr") and table[-1] == 0:
        assert process.alpha(999) == 0
        assert process.sigma(999) == 1
        assert process.log_snr(999) == -torch.inf
        assert process.snr(999) == 0


@pytest.mark.parametrize(
    "name", [n for n in VP if n not in {"DDIMInverseScheduler", "DDIMParallelScheduler"}] + list(K_DIFFUSION)
)
def test_add_noise_and_state_scale_equal_the_schedulers_own(name):
    scheduler = make(name)
    process = Process.from_scheduler(scheduler)
    x0, eps = draws()
    t = torch.tensor([2, 500, 998])
    if name in K_DIFFUSION:
        t = t.float()
    elif hasattr(scheduler, "sigmas"):
        # These look sigmas up by position, and before set_timesteps theirs lie the other way round.
        scheduler.set_timesteps(6)
        t = scheduler.timesteps[[1, 3, 4]]
    expected = scheduler.add_noise(x0, eps, t)
    ours = process.add_noise(x0, eps, t) * column(process.scheduler_state_scale(t))
    close(ours, expected)


def test_unclip_shares_the_table():
    scheduler = make("UnCLIPScheduler")
    process = Process.from_scheduler(scheduler)
    x0, eps = draws()
    t = torch.tensor([0, 400, 999])
    close(process.add_noise(x0, eps, t), scheduler.add_noise(x0, eps, t))


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler", "CogVideoXDDIMScheduler"]
)
def test_velocity_equals_get_velocity(name):
    scheduler = make(name, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    process = Process.from_scheduler(scheduler)
    x0, eps = draws()
    t = torch.tensor([0, 500, 999])
    expected = scheduler.get_velocity(x0, eps, t)
    close(process.target(x0, eps, t), expected)
    x = process.add_noise(x0, eps, t)
    close(process.to_v(expected, x, t), expected)


@pytest.mark.parametrize("name", FLOW)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_equals_scale_noise(name, shift):
    scheduler = make(name, shift=shift)
    process = Process.from_scheduler(scheduler)
    scheduler.set_timesteps(7)
    x0, eps = draws()
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=False):
        close(process.sigma(t), sigma)
        close(process.alpha(t), 1 - sigma)
    t = scheduler.timesteps[3]
    scheduler.set_begin_index(3)
    close(process.add_noise(x0, eps, t), scheduler.scale_noise(x0, t[None], eps))


@pytest.mark.parametrize("name", ["FlowMapEulerDiscreteScheduler", "LTXEulerAncestralRFScheduler"])
def test_other_flow_schedulers(name):
    scheduler = make(name)
    process = Process.from_scheduler(scheduler)
    scheduler.set_timesteps(5)
    close(process.sigma(scheduler.timesteps), scheduler.sigmas[: len(scheduler.timesteps)])


@pytest.mark.parametrize("name", FLOW_BY_CONFIG)
def test_flow_by_config_equals_convert_model_output(name):
    scheduler = make(name, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    process = Process.from_scheduler(scheduler)
    scheduler.set_timesteps(6)
    x, out = draws()
    # These round their timesteps down to integers, so ask at the time of the sigma that they use.
    for index, sigma in enumerate(scheduler.sigmas[:-1]):
        scheduler._step_index = index
        converted = scheduler.convert_model_output(out, sample=x)
        t = 1000 * sigma.double()
        if name == "DEISMultistepScheduler":
            close(process.to_eps(out, x, t), converted, 1e-3)
        else:
            close(process.to_x0(out, x, t), converted)


@pytest.mark.parametrize(
    "name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"]
)
@pytest.mark.parametrize("prediction", EPS_V)
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_edm_equals_the_preconditioning(name, prediction, spacing):
    scheduler = make(name, prediction_type=prediction, sigma_schedule=spacing)
    process = Process.from_scheduler(scheduler)
    scheduler.set_timesteps(6)
    x, out = draws()
    for index, (t, sigma) in enumerate(zip(scheduler.timesteps, scheduler.sigmas, strict=False)):
        close(process.sigma(t) / sigma, torch.ones(()), 1e-3 if name.startswith("Cosine") else 1e-5)
        t = process.time_of_log_snr(-2 * sigma.double().log())
        close(process.to_x0(out, x, t), scheduler.precondition_outputs(x, out, sigma.double()))
        close(x * process.input_scale(t), scheduler.precondition_inputs(x, sigma.double()))
        close(process.from_uniform(1 - index / 5), t, 1e-4)
    scheduler.set_begin_index(2)
    noised = scheduler.add_noise(x, out, scheduler.timesteps[2:3])
    close(process.add_noise(x, out, scheduler.timesteps[2]), noised, 1e-3)


def test_stable_video_diffusion_is_edm_with_unit_data():
    scheduler = make(
        "EulerDiscreteScheduler",
        timestep_type="continuous",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    process = Process.from_scheduler(scheduler)
    assert process.prediction_type == "edm_v"
    scheduler.set_timesteps(8)
    close(process.from_uniform(torch.linspace(1, 0, 8)), scheduler.timesteps, 1e-5)
    (x, out), t, s = draws(dtype=torch.float32), *scheduler.timesteps[3:5]
    scaled = scheduler.scale_model_input(x, t)
    close(process.input_scale(t) * x, scaled)
    step = scheduler.step(out, t, x)
    close(process.to_x0(out, x, t), step.pred_original_sample)
    close(process.jump(x, t, s, out=out), step.prev_sample)


def test_ipndm_is_v_prediction_on_the_quarter_circle():
    scheduler = make("IPNDMScheduler")
    process = Process.from_scheduler(scheduler)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps
    close(process.sigma(t), scheduler.betas[:-1], 1e-6)
    close(process.alpha(t), scheduler.alphas[:-1], 1e-6)
    assert process.alpha(1.0) == 0
    x, out = draws()
    scheduler.set_begin_index(4)  # its first step is the plain one
    close(process.jump(x, t[4], t[5], out=out), scheduler.step(out, t[4], x).prev_sample)


# Second implementations: conversions and steps


@pytest.mark.parametrize("prediction", EPS_V_X)
@pytest.mark.parametrize(
    ("name", "config", "what"),
    [
        ("DPMSolverMultistepScheduler", {}, "x0"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
            "eps",
        ),
        ("DPMSolverMultistepInverseScheduler", {}, "x0"),
        ("DPMSolverSinglestepScheduler", {}, "x0"),
        ("UniPCMultistepScheduler", {}, "x0"),
        ("UniPCMultistepScheduler", {"predict_x0": False}, "eps"),
        ("SASolverScheduler", {}, "x0"),
        ("SASolverScheduler", {"algorithm_type": "noise_prediction"}, "eps"),
        ("DEISMultistepScheduler", {}, "eps"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_conversions_equal_convert_model_output(name, config, what, prediction):
    scheduler = make(name, prediction_type=prediction, **config)
    process = Process.from_scheduler(scheduler)
    scheduler.set_timesteps(5)
    x, out = draws()
    convert = process.to_x0 if what == "x0" else process.to_eps
    for index, t in enumerate(scheduler.timesteps):
        scheduler._step_index = index
        close(convert(out, x, t), scheduler.convert_model_output(out, sample=x), 1e-4)


@pytest.mark.parametrize(
    ("prediction", "zero_snr"),
    [(prediction, zero) for prediction in EPS_V_X for zero in (False, True) if (prediction, zero) != ("epsilon", True)],
)
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_jump_equals_ddim(prediction, zero_snr, eta):
    scheduler = make(
        "DDIMScheduler",
        prediction_type=prediction,
        clip_sample=False,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",
    )
    process = Process.from_scheduler(scheduler)
    scheduler.set_timesteps(8)
    x, out, noise = draws(count=3)
    times = [*scheduler.timesteps.tolist(), process.clean_time]
    for t, s in pairwise(times):
        step = scheduler.step(out, t, x, eta=eta, variance_noise=noise)
        ours = process.jump(x, t, s, out=out, eta=eta, noise=noise if eta else None)
        close(ours, step.prev_sample, 2e-5)
        close(process.to_x0(out, x, t), step.pred_original_sample, 2e-5)


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        (name, prediction)
        for name in ("EulerDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler")
        for prediction in (EPS_V if name.startswith("Heun") else EPS_V_X)
    ],
)
def test_jump_equals_euler_in_its_own_state_space(name, prediction):
    scheduler = make(name, prediction_type=prediction)
    process = Process.from_scheduler(scheduler)
    scheduler.set_timesteps(10)  # timesteps 999, 888, ...: integers, where the two interpolations agree
    x, out = draws()
    t, s = scheduler.timesteps[0], scheduler.timesteps[1]
    theirs = x * process.scheduler_state_scale(t)
    close(scheduler.scale_model_input(theirs, t), x)
    ours = process.jump(x, t, s, out=out) * process.scheduler_state_scale(s)
    close(ours, scheduler.step(out, t, theirs).prev_sample)


def test_jump_equals_flow_euler_and_mochi_runs_backwards():
    for inverted in (False, True):
        scheduler = make("FlowMatchEulerDiscreteScheduler", invert_sigmas=inverted)
        process = Process.from_scheduler(scheduler)
        scheduler.set_timesteps(5)
        x, out = draws(dtype=torch.float32)
        t, s = scheduler.timesteps[1:3]
        close(process.jump(x, t, s, out=out), scheduler.step(out, scheduler.timesteps[1], x).prev_sample)
    assert process.clean_time == 1000
    assert process.log_snr(900) > process.log_snr(100)


def test_jump_equals_edm_euler():
    scheduler = make("EDMEulerScheduler")
    process = Process.from_scheduler(scheduler)
    scheduler.set_timesteps(5)
    x, out = draws(dtype=torch.float32)
    scheduler.scale_model_input(x, scheduler.timesteps[2])
    step = scheduler.step(out, scheduler.timesteps[2], x)
    close(process.jump(x, *scheduler.timesteps[2:4], out=out), step.prev_sample)
    scheduler.step(out, scheduler.timesteps[3], x)
    last = scheduler.step(out, scheduler.timesteps[4], x)
    close(process.jump(x, scheduler.timesteps[4], process.clean_time, out=out), last.prev_sample)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"])
def test_fractional_times_equal_sigma_to_t(name):
    scheduler = make(name, beta_schedule="scaled_linear", use_karras_sigmas=True)
    process = Process.from_scheduler(scheduler)
    scheduler.set_timesteps(9)
    t = scheduler.timesteps
    assert (t != t.round()).any()
    sigmas = scheduler.sigmas[: len(t)].double()
    close((process.sigma(t) / process.alpha(t)) / sigmas, torch.ones(len(t)), 1e-3)
    close(process.time_of_log_snr(-2 * sigmas.log()), t, 1e-4)


def test_shift_equals_the_schedulers_spacing():
    scheduler = make("FlowMatchEulerDiscreteScheduler", shift=3.0)
    process = Process.from_scheduler(scheduler)
    scheduler.set_timesteps(6)
    # The scheduler spaces down to its sigma_min, which it has shifted once already.
    u = torch.linspace(scheduler.sigma_max, scheduler.sigma_min, 6, dtype=torch.float64)
    close(process.from_uniform(u), scheduler.timesteps)
    close(process.shift_time(1000 * u), scheduler.timesteps)
    scheduler.set_shift(5.0)
    assert Process.from_scheduler(scheduler) == process.with_shift(5.0)


@pytest.mark.parametrize("rule", ["exponential", "linear"])
def test_dynamic_shift_equals_the_schedulers_spacing(rule):
    scheduler = make("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, time_shift_type=rule)
    process = Process.from_scheduler(scheduler)
    sigmas = np.linspace(1, 0.2, 5)
    scheduler.set_timesteps(sigmas=sigmas, mu=1.15)
    close(process.with_mu(1.15).from_uniform(torch.from_numpy(sigmas)), scheduler.timesteps)
    with pytest.raises(InputError, match=r"shifts by resolution; set the shift with process\.with_mu\(mu\) first"):
        process.from_uniform(0.5)


@pytest.mark.parametrize("prediction", EPS_V)
def test_euler_ancestral_means_the_same_x0(prediction):
    scheduler = make("EulerAncestralDiscreteScheduler", prediction_type=prediction)
    process = Process.from_scheduler(scheduler)
    scheduler.set_timesteps(10)
    x, out = draws(dtype=torch.float32)
    t = scheduler.timesteps[0]
    theirs = scheduler.step(out, t, x * process.scheduler_state_scale(t).float()).pred_original_sample
    close(process.to_x0(out, x, t), theirs, 1e-4)


@pytest.mark.parametrize("prediction", EPS_V)
def test_jump_equals_the_transfer_of_pndm(prediction):
    scheduler = make("PNDMScheduler", prediction_type=prediction)
    process = Process.from_scheduler(scheduler)
    x, out = draws()
    for t, s in ((999, 700), (300, 100), (40, 60)):
        close(process.jump(x, t, s, out=out), scheduler._get_prev_sample(x, t, s, out), 1e-4)


@pytest.mark.parametrize("prediction", EPS_V_X)
def test_ancestral_jump_equals_ddpm(prediction):
    scheduler = make("DDPMScheduler", prediction_type=prediction, clip_sample=False)
    process = Process.from_scheduler(scheduler)
    scheduler.set_timesteps(10)
    x, out = draws()
    for t, s in pairwise(scheduler.timesteps.tolist()):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t), dtype=x.dtype)
        step = scheduler.step(out, t, x, generator=torch.Generator().manual_seed(t))
        close(process.jump(x, t, s, out=out, eta=1.0, noise=noise), step.prev_sample, 1e-4)
