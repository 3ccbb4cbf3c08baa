"""Grid rules in plans, on pipelines and beside what a scheduler adds to a list."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, KDPM2DiscreteScheduler
from rule_cases import grid
from tiny import call_arguments, tiny_dit, tiny_scheduler, tiny_sd3, tiny_stable_diffusion, tiny_unet

from fewstep.samplers import DiffusersSolver, ExplicitGrid, Part, Plan, Run, SpacingGrid, attach
from fewstep.samplers.explicit import grid_adapter
from fewstep.samplers.rule_grid import RuleGrid
from fewstep.samplers.rules import RULES
from fewstep.samplers.wrapped import wrap_scheduler


@pytest.mark.parametrize("rule", RULES.names())
def test_plans_are_saved_and_loaded(rule, tmp_path):
    plan = Plan(grid=RuleGrid(rule=rule, steps=6, options={"round": False}))
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert isinstance(loaded.grid, Part)
    assert loaded.nominal_steps == 6


PIPELINES = {
    "unet": lambda: tiny_unet(scheduler=tiny_scheduler()),
    "dit": tiny_dit,
    "stable diffusion": tiny_stable_diffusion,
    "sd3": tiny_sd3,
}


@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, rule) for name in ("unet", "sd3") for rule in RULES.names() if rule != "trailing-zero-snr"]
    + [(name, rule) for name in ("dit", "stable diffusion") for rule in ("trailing", "karras", "align-your-steps")],
)
def test_pipelines_run_the_rule(name, rule):
    pipe = PIPELINES[name]()
    listed, _ = grid(pipe.scheduler, rule, 3)
    with attach(pipe, Plan(grid=RuleGrid(rule=rule, steps=3))) as handle:
        by_rule = pipe(**call_arguments(pipe)).images
    assert [step.timestep for step in handle.stats.steps] == pytest.approx(listed, rel=1e-6)
    with attach(pipe, Plan(grid=ExplicitGrid(timesteps=listed))):
        assert np.array_equal(pipe(**call_arguments(pipe)).images, by_rule)


@pytest.mark.parametrize(
    ("solver", "spacing"),
    [
        (solver, spacing)
        for solver in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
        for spacing in ("leading", "linspace", "trailing")
        if (solver, spacing) != ("DDIMScheduler", "linspace")
    ],
)
def test_a_spacing_by_rule_is_the_spacing_of_the_scheduler_bit_for_bit(solver, spacing):
    """Also Euler's first state, which diffusers scales by spacing.

    Not DDIM's linspace, where diffusers lands at ``t - 1000 // steps`` and not at the next timestep of its grid.
    """
    pipe = tiny_stable_diffusion()
    images = []
    for part in (SpacingGrid(steps=4, spacing=spacing), RuleGrid(rule=spacing, steps=4)):
        with attach(pipe, Plan(solver=DiffusersSolver(scheduler=solver), grid=part)):
            images.append(pipe(**call_arguments(pipe)).images)
    assert np.array_equal(*images)


def test_zero_snr_in_a_pipeline():
    pipe = tiny_dit()
    table = pipe.scheduler.alphas_cumprod.clone()
    with attach(pipe, Plan(grid=RuleGrid(rule="trailing-zero-snr", steps=3))) as handle:
        assert pipe.scheduler.alphas_cumprod[-1] == 0
        assert np.isfinite(pipe(**call_arguments(pipe)).images).all()
    assert handle.stats.steps[0].timestep == 999
    assert torch.equal(pipe.scheduler.alphas_cumprod, table)


def test_a_second_evaluation_point_stays_between_listed_times():
    """KDPM2 evaluates in the middle of log sigma too; the listed times are every other one."""
    listed, scheduler = grid(KDPM2DiscreteScheduler(), "karras", 4)
    wrap_scheduler(scheduler, grid_adapter(scheduler, listed))
    scheduler.set_timesteps(4)
    np.testing.assert_allclose(scheduler.timesteps[[0, 2, 4, 6]].double().numpy(), listed, rtol=1e-6)


def test_flow_heun_takes_the_same_grid_as_flow_euler():
    euler, _ = grid(FlowMatchEulerDiscreteScheduler(shift=2.0), "karras", 5)
    assert euler == grid(FlowMatchHeunDiscreteScheduler(shift=2.0), "karras", 5)[0]


def test_a_stretch_that_a_list_does_not_have_is_said():
    run = Run(None, FlowMatchEulerDiscreteScheduler(shift_terminal=0.1))
    RuleGrid(rule="trailing", steps=4).prepare(run, frozenset({"num_inference_steps"}))
    assert run.warnings == ["the scheduler's shift_terminal does not act on a grid by rule; set 'last' if needed"]
