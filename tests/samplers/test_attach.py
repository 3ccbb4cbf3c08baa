"""Attaching and detaching: the plan runs, is counted, and leaves no trace."""

import copy
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny import TINY, call_arguments, tiny_dit, tiny_scheduler, tiny_stable_diffusion, tiny_unet

from fewstep.samplers import (
    ConstantGuidance,
    DiffusersSolver,
    ExplicitGrid,
    InputError,
    Plan,
    PlanWarning,
    SpacingGrid,
    TunedFor,
    attach,
    fingerprint,
)

FIVE = Plan(
    solver=DiffusersSolver(scheduler="DPMSolverMultistepScheduler"),
    grid=SpacingGrid(steps=5, spacing="trailing"),
)


def state_of(pipe):
    """Everything of a pipeline that a plan could leave changed."""
    hooks = [
        (name, len(m._forward_pre_hooks), len(m._forward_hooks))
        for part in pipe.components.values()
        if isinstance(part, torch.nn.Module)
        for name, m in part.named_modules()
    ]
    assert "_fewstep_attachment" not in vars(pipe)
    attributes = {name: id(value) for name, value in vars(pipe).items() if not name.startswith("_")}
    return (
        type(pipe),
        attributes,
        dict(pipe.config),
        dict(pipe.scheduler.config),
        vars(pipe.scheduler).keys(),
        hooks,
    )


@pytest.mark.parametrize("name", TINY)
def test_an_empty_plan_changes_nothing_and_counts(name):
    pipe = TINY[name]()
    arguments = {"num_inference_steps": 4} | ({} if name == "unet" else {"guidance_scale": 3.0})
    plain = pipe(**call_arguments(pipe), **arguments).images
    before = state_of(pipe)
    with attach(pipe, Plan()) as handle:
        assert np.array_equal(pipe(**call_arguments(pipe), **arguments).images, plain)
    guided = name != "unet"
    assert handle.stats.nfe == 4 * (2 if guided else 1)
    assert handle.stats.images == 2
    assert len(handle.stats.steps) == 4
    assert [step.rows for step in handle.stats.steps] == [4 if guided else 2] * 4
    assert state_of(pipe) == before


@pytest.mark.parametrize(("scale", "nfe"), [(1.0, 5), (2.0, 10)])
def test_guidance_of_a_plan_is_the_guidance_of_the_call(scale, nfe):
    pipe = tiny_dit()
    expected = pipe(**call_arguments(pipe), num_inference_steps=5, guidance_scale=scale).images
    with attach(pipe, Plan(grid=SpacingGrid(steps=5), guidance=ConstantGuidance(scale=scale))) as handle:
        assert np.array_equal(pipe(**call_arguments(pipe)).images, expected)
    assert handle.stats.nfe == nfe


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler]
)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_a_solver_by_name_is_the_scheduler_set_by_hand(scheduler, spacing):
    pipe = tiny_stable_diffusion()
    plan = Plan(solver=DiffusersSolver(scheduler=scheduler.__name__), grid=SpacingGrid(steps=6, spacing=spacing))
    by_hand = tiny_stable_diffusion(scheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing))
    expected = by_hand(**call_arguments(by_hand), num_inference_steps=6).images
    with attach(pipe, plan):
        assert np.array_equal(pipe(**call_arguments(pipe)).images, expected)


@pytest.mark.parametrize("pipeline", ["dit", DDIMPipeline, DDPMPipeline])
def test_euler_equals_ddim_on_pipelines_that_never_scale_their_noise(pipeline):
    """Euler in sigma space and DDIM are one method; DiTPipeline and DDIMPipeline feed Euler unscaled noise."""
    pipe = tiny_dit() if pipeline == "dit" else tiny_unet(pipeline)
    images = {}
    for name in ("DDIMScheduler", "EulerDiscreteScheduler"):
        plan = Plan(solver=DiffusersSolver(scheduler=name), grid=SpacingGrid(steps=10, spacing="trailing"))
        with attach(pipe, plan):
            images[name] = pipe(**call_arguments(pipe)).images
    assert images["DDIMScheduler"].std() > 0.05
    np.testing.assert_allclose(images["EulerDiscreteScheduler"], images["DDIMScheduler"], atol=2e-4)


@pytest.mark.parametrize(
    "scheduler", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_ddim_pipeline_runs_solvers_that_take_no_eta(scheduler):
    pipe = tiny_unet()
    with attach(pipe, Plan(solver=DiffusersSolver(scheduler=scheduler), grid=SpacingGrid(steps=4))) as handle:
        pipe(**call_arguments(pipe))
        assert handle.stats.nfe == (7 if scheduler.startswith("Heun") else 4)
        with pytest.raises(InputError, match=r"takes no eta=0\.5 from the pipeline's call"):
            pipe(**call_arguments(pipe), eta=0.5)


def test_detach_after_exceptions_inside_the_call():
    pipe = tiny_stable_diffusion()
    plain = pipe(**call_arguments(pipe), num_inference_steps=4).images
    before = state_of(pipe)
    for error in (RuntimeError, KeyboardInterrupt):

        def stop(pipe, step, timestep, kwargs, error=error):
            if step == 1:
                raise error
            return kwargs

        with pytest.raises(error), attach(pipe, FIVE) as handle:
            pipe(**call_arguments(pipe), callback_on_step_end=stop)
        assert state_of(pipe) == before
        assert not handle.stats.finished
        assert len(handle.stats.steps) == 2
        assert np.array_equal(pipe(**call_arguments(pipe), num_inference_steps=4).images, plain)


def test_a_call_after_a_failed_call_starts_clean():
    """With another batch and another resolution, and the plan still attached."""
    pipe = tiny_stable_diffusion()
    small = call_arguments(pipe, batch=1) | {"height": 32, "width": 16}
    with attach(pipe, FIVE):
        expected = pipe(**small).images
    with attach(pipe, FIVE):
        with pytest.raises(RuntimeError):
            pipe(**call_arguments(pipe), callback_on_step_end=lambda *_: (_ for _ in ()).throw(RuntimeError))
        assert np.array_equal(pipe(**call_arguments(pipe, batch=1) | {"height": 32, "width": 16}).images, expected)


def test_another_scheduler_assigned_meanwhile():
    pipe = tiny_stable_diffusion()
    before, config = pipe.scheduler, dict(pipe.config)
    handle = attach(pipe, FIVE)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(InputError, match="the scheduler was replaced while a plan is attached; detach the plan first"):
        pipe(**call_arguments(pipe))
    handle.detach()
    assert pipe.scheduler is before
    assert dict(pipe.config) == config


def test_a_second_plan_is_refused_and_the_first_one_stays():
    pipe = tiny_dit()
    with attach(pipe, FIVE) as handle:
        with pytest.raises(InputError, match=r"a plan is attached to this pipeline already; call \.detach\(\)"):
            attach(pipe, Plan())
        pipe(**call_arguments(pipe))
        assert len(handle.stats.steps) == 5
    handle.detach()
    with attach(pipe, Plan()):
        pass


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(solver=DiffusersSolver(scheduler="DDIMSheduler")), "did you mean 'DDIMScheduler'"),
        (Plan(solver=DiffusersSolver(scheduler="SchedulerMixin")), "unknown scheduler 'SchedulerMixin'"),
        (
            Plan(solver=DiffusersSolver(scheduler="DDIMScheduler", config={"clip_samples": True})),
            "unknown option of DDIMScheduler 'clip_samples'; did you mean 'clip_sample'",
        ),
        (
            Plan(solver=DiffusersSolver(scheduler="DPMSolverMultistepScheduler", config={"algorithm_type": "x"})),
            "DPMSolverMultistepScheduler refuses this configuration",
        ),
        (
            Plan(guidance=ConstantGuidance(scale=2.0)),
            "DDIMPipeline takes no argument 'guidance_scale'; remove the guidance part",
        ),
        (
            Plan(grid=ExplicitGrid(timesteps=(1000, 5))),
            "timestep 1000 is out of range; this scheduler was trained on 0 to 999",
        ),
        (
            Plan(solver=DiffusersSolver(scheduler="DDIMInverseScheduler"), grid=ExplicitGrid(timesteps=(900, 5))),
            "DDIMInverseScheduler does not run an explicit grid: it walks from data to noise",
        ),
        (
            Plan(
                solver=DiffusersSolver(scheduler="EulerDiscreteScheduler", config={"use_karras_sigmas": True}),
                grid=ExplicitGrid(timesteps=(900, 5)),
            ),
            "use_karras_sigmas=True makes a grid of its own",
        ),
        (
            Plan(
                solver=DiffusersSolver(scheduler="FlowMatchEulerDiscreteScheduler"),
                grid=SpacingGrid(steps=3, spacing="leading"),
            ),
            "FlowMatchEulerDiscreteScheduler has no timestep_spacing",
        ),
    ],
)
def test_a_failed_attach_leaves_the_pipeline_as_it_was(plan, words):
    pipe = tiny_unet()
    before = state_of(pipe)
    with pytest.raises(InputError) as caught:
        attach(pipe, plan)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert state_of(pipe) == before


def test_what_is_no_plan_and_no_pipeline():
    with pytest.raises(InputError, match="attach takes a Plan; got str"):
        attach(tiny_unet(), "plan.json")
    with pytest.raises(InputError, match="attach takes a diffusers pipeline with a scheduler; got Linear"):
        attach(torch.nn.Linear(1, 1), Plan())


def test_a_call_that_contradicts_the_plan():
    pipe = tiny_dit()
    with attach(pipe, Plan(grid=SpacingGrid(steps=5), guidance=ConstantGuidance(scale=2.0))):
        pipe(**call_arguments(pipe), num_inference_steps=5)
        with pytest.raises(InputError, match="the plan sets num_inference_steps=5; got num_inference_steps=50"):
            pipe(**call_arguments(pipe), num_inference_steps=50)
        with pytest.raises(InputError, match=r"the plan sets guidance_scale=2\.0; got guidance_scale=4\.0"):
            pipe(**call_arguments(pipe), guidance_scale=4.0)
    pipe = tiny_stable_diffusion()
    with (
        attach(pipe, FIVE),
        pytest.raises(InputError, match="the plan has a grid; got timesteps in the call"),
    ):
        pipe(**call_arguments(pipe), timesteps=[900, 10])


def test_a_plan_for_other_weights_warns():
    pipe = tiny_dit()
    mine = fingerprint(pipe.transformer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(pipe, Plan(tuned_for=TunedFor(fingerprint=mine, pipeline="DiTPipeline"))).detach()
    with torch.no_grad():
        pipe.transformer.proj_out_2.bias[0] += 1
    with pytest.warns(PlanWarning, match="tuned for other weights"):
        handle = attach(pipe, Plan(tuned_for=TunedFor(fingerprint=mine)))
    pipe(**call_arguments(pipe), num_inference_steps=2)
    assert "measure it again" in handle.stats.warnings[0]
    handle.detach()
    with pytest.warns(PlanWarning, match="tuned for DDIMPipeline, not for DiTPipeline"):
        attach(pipe, Plan(tuned_for=TunedFor(pipeline="DDIMPipeline"))).detach()


def test_pipelines_that_share_a_network_in_two_threads_do_not_see_each_other():
    first = tiny_dit()
    second = type(first)(transformer=first.transformer, vae=first.vae, scheduler=copy.deepcopy(first.scheduler))
    second.set_progress_bar_config(disable=True)
    handles = [attach(first, FIVE), attach(second, Plan(grid=SpacingGrid(steps=9)))]
    alone = [pipe(**call_arguments(pipe)).images for pipe in (first, second)]
    results = [None, None]

    def work(index, pipe):
        for _ in range(5):
            results[index] = pipe(**call_arguments(pipe)).images

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [handle.stats.nfe for handle in handles] == [10, 18]
    for index in (0, 1):
        assert np.array_equal(results[index], alone[index])


def test_the_saved_pipeline_after_detach_is_what_it_was(tmp_path):
    pipe = tiny_dit()
    pipe.save_pretrained(tmp_path / "before")
    with attach(pipe, FIVE):
        pipe(**call_arguments(pipe))
    pipe.save_pretrained(tmp_path / "after")
    files = sorted(p.relative_to(tmp_path / "before") for p in (tmp_path / "before").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "after") for p in (tmp_path / "after").rglob("*") if p.is_file())
    for file in files:
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()


def test_two_hundred_random_sequences_end_where_they_began():
    """Attach, run, raise, swap the scheduler, change the batch, detach: the pipeline is a fresh one afterwards."""
    draw = random.Random(0)
    pipe, fresh = tiny_dit(), tiny_dit()
    expected = fresh(**call_arguments(fresh), num_inference_steps=3).images
    before = state_of(pipe)
    plans = [
        Plan(),
        FIVE,
        Plan(grid=ExplicitGrid(timesteps=(999, 400.5, 10))),
        Plan(solver=DiffusersSolver(scheduler="EulerDiscreteScheduler"), grid=SpacingGrid(steps=2)),
        Plan(grid=SpacingGrid(steps=2), guidance=ConstantGuidance(scale=2.0)),
    ]
    for _ in range(200):
        plan = draw.choice(plans)
        handle = attach(pipe, plan)
        for action in draw.sample(["run", "raise", "swap", "refused", "batch"], draw.randint(1, 3)):
            steps = {} if plan.nominal_steps else {"num_inference_steps": 2}
            if action == "swap":
                pipe.scheduler = tiny_scheduler()
                break
            if action == "run":
                pipe(**call_arguments(pipe), **steps)
            elif action == "batch":
                pipe(**call_arguments(pipe, batch=draw.randint(1, 3)), **steps)
            elif action == "refused":
                with pytest.raises(InputError):
                    attach(pipe, plan)
            else:
                hook = pipe.vae.decoder.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    pipe(**call_arguments(pipe), **steps)
                hook.remove()
        handle.detach()
        assert state_of(pipe) == before
    assert np.array_equal(pipe(**call_arguments(pipe), num_inference_steps=3).images, expected)


def test_a_scheduler_that_takes_the_time_elsewhere_is_refused():
    pipe = tiny_unet()
    pipe.scheduler = CogVideoXDPMScheduler()
    with pytest.raises(InputError, match=r"CogVideoXDPMScheduler takes .*timestep_back.* in its step"):
        attach(pipe, Plan())
    assert type(pipe.scheduler) is CogVideoXDPMScheduler
