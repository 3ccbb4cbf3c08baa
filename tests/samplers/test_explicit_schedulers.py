"""Explicit grids on every scheduler: its own as a list, what the network is told, reasons where there is none."""

import copy
import inspect

import diffusers
import numpy as np
import pytest
import torch
from explicit_cases import INSTALLED, NEED_TORCHSDE, explicit, make, trajectory, wavy
from tiny import call_arguments, tiny_sd3, tiny_stable_diffusion, tiny_unet

from fewstep.samplers import DiffusersSolver, ExplicitGrid, InputError, Plan, Process, SpacingGrid, attach
from fewstep.samplers.explicit import EXPLICIT, FACTS, REASONS, explicit_support, grid_adapter
from fewstep.samplers.solver import scheduler_names

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::DeprecationWarning:numpy")


# The scheduler's own grid, given as a list

OWN = [(name, {}) for name in INSTALLED]
OWN += [
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "v_prediction", "set_alpha_to_one": True}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    ("DDPMScheduler", {"variance_type": "fixed_large"}),
    ("EDMEulerScheduler", {"final_sigmas_type": "sigma_min"}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
]
"Schedulers, and options that take another way through their adapter."

ROUNDED = {
    "EDMDPMSolverMultistepScheduler": 3e-6,  # the listed time is a rounded logarithm of sigma
    "EDMEulerScheduler": 3e-6,
    "CosineDPMSolverMultistepScheduler": 1e-2,  # a rounded arctan, flat at sigma 500: noise of a nearby Brownian time
    "EulerDiscreteScheduler": 3e-6,  # continuous v-prediction is EDM; its other ways are exact, see `exact` below
    "IPNDMScheduler": 5e-6,  # its sigma is the sine of the listed, rounded, arcsine of sigma
    "DDPMScheduler": 1e-6,  # noise of standard deviation 1e-10 that diffusers adds to a finished sample
    "DDPMParallelScheduler": 1e-6,
    "FlowMatchHeunDiscreteScheduler": 1e-6,  # the listed time is 1000 sigma, rounded
    "FlowMatchEulerDiscreteScheduler": 1e-6,
    "FlowMatchLCMScheduler": 1e-6,
    "FlowMapEulerDiscreteScheduler": 1e-6,
    "LTXEulerAncestralRFScheduler": 1e-6,
}
"Relative tolerance, to the largest state, where a listed time does not say all that the scheduler's own table holds."

NOT_ITS_OWN_STEPS = ("CogVideoXDDIMScheduler", "DDIMParallelScheduler", "DDIMScheduler")
"With linspace they step ``1000 // steps`` down from wherever they are, past the time that they call next: a defect."


def own_list(scheduler, steps):
    """The points that ``steps`` stands for, without the scheduler's own points between."""
    scheduler.set_timesteps(steps)
    if type(scheduler).__name__ == "PNDMScheduler":
        return scheduler._timesteps[::-1].tolist()
    inner = ("DPMSolverSDEScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler")
    times = scheduler.timesteps[0::2] if type(scheduler).__name__ in inner else scheduler.timesteps
    return list(dict.fromkeys(times.tolist()))


def spacings(name):
    if "timestep_spacing" not in inspect.signature(getattr(diffusers, name).__init__).parameters:
        return [{}]
    rules = ("leading", "trailing") if name in NOT_ITS_OWN_STEPS else ("leading", "linspace", "trailing")
    return [{"timestep_spacing": rule} for rule in rules]


@pytest.mark.parametrize(("name", "options"), OWN, ids=lambda value: str(value))
def test_the_schedulers_own_grid_given_as_a_list_is_itself(name, options):
    if name == "DPMSolverSDEScheduler":
        options = options | {"noise_sampler_seed": 5}
    for spacing in spacings(name):
        own = make(name, **options, **spacing)
        fresh = copy.deepcopy(own)
        for steps in (1, 2, 5, 10):
            if name == "PNDMScheduler" and not options and steps < 4:
                continue  # diffusers' Runge-Kutta start needs four points
            if name in NEED_TORCHSDE and steps == 1:
                continue  # torchsde makes no Brownian path between equal ends
            listed = explicit(copy.deepcopy(fresh), own_list(own, steps))
            expected, got = trajectory(own, wavy), trajectory(listed, wavy)
            if options.get("variance_type") == "fixed_large":  # diffusers noises the finished sample: not compared
                expected, got = expected[:-1], got[:-1]
            exact = name not in ROUNDED or (name == "EulerDiscreteScheduler" and not options)
            tolerance = 0.0 if exact else ROUNDED[name] * max(1.0, float(getattr(own, "init_noise_sigma", 1.0)))
            case = f"{spacing}, {steps} steps"
            torch.testing.assert_close(
                got, expected, rtol=0, atol=tolerance, msg=lambda words, case=case: f"{case}: {words}"
            )


def sequence(handle):
    return list(dict.fromkeys(step.timestep for step in handle.stats.steps))


PIPELINES = [
    (tiny_stable_diffusion, "DDPMScheduler", {}),
    (tiny_stable_diffusion, "HeunDiscreteScheduler", {}),
    (tiny_stable_diffusion, "LMSDiscreteScheduler", {}),
    (tiny_stable_diffusion, "PNDMScheduler", {"skip_prk_steps": True}),
    (tiny_stable_diffusion, "DPMSolverSinglestepScheduler", {}),
    (tiny_stable_diffusion, "SASolverScheduler", {}),
    (tiny_unet, "EulerAncestralDiscreteScheduler", {}),
    (tiny_unet, "HeunDiscreteScheduler", {}),
    (tiny_unet, "LCMScheduler", {}),
    (tiny_sd3, "FlowMatchHeunDiscreteScheduler", {}),
]


@pytest.mark.parametrize(
    ("tiny", "name", "options"), PIPELINES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_the_schedulers_own_grid_through_a_pipeline(tiny, name, options):
    """Bit for bit, but for the one rounding of flow matching's sigma and DDPM's last noise."""
    pipe = tiny()
    solver = DiffusersSolver(scheduler=name, config=options)
    with attach(pipe, Plan(solver=solver, grid=SpacingGrid(steps=5))) as handle:
        own = pipe(**call_arguments(pipe)).images
    with attach(pipe, Plan(solver=solver, grid=ExplicitGrid(timesteps=sequence(handle)))) as again:
        got = pipe(**call_arguments(pipe)).images
    assert len(sequence(again)) == 5
    np.testing.assert_allclose(got, own, rtol=0, atol=1e-6 if name in ROUNDED else 0.0)
    assert again.stats.nfe == handle.stats.nfe


@pytest.mark.parametrize("name", [name for name in INSTALLED if "EDM" not in name and name not in NEED_TORCHSDE])
def test_a_pipeline_tells_its_network_the_listed_times(name):
    pipe = tiny_sd3() if "Flow" in name or "RF" in name else tiny_unet()
    grid = (1.0, 0.5, 0.25) if name == "IPNDMScheduler" else (999, 700.25, 333, 20.5)
    told = []
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    network.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(float(kwargs["timestep"][0] if kwargs else args[1])), with_kwargs=True
    )
    with attach(pipe, Plan(solver=DiffusersSolver(scheduler=name), grid=ExplicitGrid(timesteps=grid))) as handle:
        images = pipe(**call_arguments(pipe)).images
    assert np.isfinite(images).all()
    assert told == [step.timestep for step in handle.stats.steps]
    assert [time for time in dict.fromkeys(told) if time in grid] == list(grid)


# What does not run


def test_every_scheduler_runs_a_list_or_has_a_reason():
    support = explicit_support()
    assert [row.scheduler for row in support] == scheduler_names()
    assert {row.scheduler for row in support if row.runs} == set(EXPLICIT.names()) == set(FACTS)
    assert {row.scheduler for row in support if not row.runs} == set(REASONS)
    for row in support:
        assert (row.reason is None) == row.runs
        assert row.reason is None or (row.order is None and row.note == "" and len(row.reason) > 20)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("VQDiffusionScheduler", "VQDiffusionScheduler does not run an explicit grid: it unmasks discrete tokens"),
        ("RePaintScheduler", "it jumps back to noisier times"),
        ("UnCLIPScheduler", "its pipelines, not the scheduler, say where a step lands"),
    ],
)
def test_a_scheduler_that_cannot_says_why(name, words):
    class Stub:
        pass

    Stub.__name__ = name
    with pytest.raises(InputError, match=words) as caught:
        grid_adapter(Stub(), (900.0,))
    assert "use a 'spacing' grid, or one of CogVideoXDDIMScheduler," in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "grid", "words"),
    [
        ("HeunDiscreteScheduler", {}, (1000.0, 5.0), "timestep 1000 is out of range; this scheduler was trained on 0"),
        ("PNDMScheduler", {}, (500.0, -1.0), "timestep -1 is out of range; this scheduler was trained on 0 to 999"),
        ("LCMScheduler", {}, (999.5, 5.0), "timestep 999.5 is out of range"),
        ("DDPMScheduler", {}, (1001.0,), "timestep 1001 is out of range"),
        ("FlowMatchHeunDiscreteScheduler", {}, (900.0, 0.0), "flow-matching times are above 0 and at most 1000"),
        ("FlowMatchLCMScheduler", {"invert_sigmas": True}, (900.0,), "invert_sigmas=True reverses the time axis"),
        ("FlowMatchLCMScheduler", {"use_karras_sigmas": True}, (900.0,), "use_karras_sigmas=True makes a grid"),
        ("EDMEulerScheduler", {}, (2.0, 0.0), "timestep 2 is out of range; the times of this scheduler's sigma_min"),
        ("EDMDPMSolverMultistepScheduler", {}, (1.0, -1.6), "sigma_max are -1.554 and 1.096"),
        ("IPNDMScheduler", {}, (1.5, 0.5), "timestep 1.5 is out of range; IPNDM's times are above 0 and at most 1"),
        ("IPNDMScheduler", {}, (1.0, 0.0), "timestep 0 is out of range"),
        ("KDPM2DiscreteScheduler", {"use_exponential_sigmas": True}, (900.0,), "use_exponential_sigmas=True makes"),
    ],
)
def test_a_grid_that_does_not_fit(name, options, grid, words):
    with pytest.raises(InputError, match=words) as caught:
        grid_adapter(make(name, **options), grid)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "own", "options"),
    [
        ("DDIMScheduler", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DDIMScheduler", "EulerDiscreteScheduler", {"use_beta_sigmas": True}),
        ("LCMScheduler", "DEISMultistepScheduler", {"use_exponential_sigmas": True}),
        ("DDPMScheduler", "DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
        ("FlowMatchHeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    ],
)
def test_options_that_only_the_pipelines_scheduler_takes_change_nothing(name, own, options):
    """``from_config`` keeps them in the solver's config."""
    made = [getattr(diffusers, name).from_config(make(own, **given).config) for given in (options, {})]
    assert made[0].config.items() >= options.items()
    assert Process.from_scheduler(made[0]) == Process.from_scheduler(made[1])
    states = [trajectory(explicit(scheduler, (900.0, 410.0, 30.0)), wavy) for scheduler in made]
    assert torch.equal(*states)


def test_the_negative_times_of_edm_are_a_grid():
    grid = ExplicitGrid(timesteps=(1.0, 0.25, -0.5))
    scheduler = explicit(make("EDMEulerScheduler"), grid.timesteps)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([4.0, 1.0, -2.0, -torch.inf]).exp())
