"""What hooks see of a call, and what they may change."""

import threading
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from tiny import TINY, call_arguments, tiny_dit, tiny_sd3, tiny_stable_diffusion, tiny_unet

from fewstep.samplers import CallHook, DiffusersSolver, InputError, Part, Plan, SpacingGrid, attach
from fewstep.samplers.correction import CORRECTIONS
from fewstep.samplers.network import time_unit

SOLVERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
)


@pytest.fixture
def plan_with(monkeypatch):
    """Makes a plan whose one part runs the hook that it is given."""
    monkeypatch.setattr(CORRECTIONS, "_table", dict(CORRECTIONS._table))

    hooks = []

    @CORRECTIONS.register("probe")
    class Probe(Part):
        type: Literal["probe"] = "probe"

        def prepare(self, run, known_arguments):
            run.hooks.append(lambda: hooks[-1])

    def make(hook, **parts):
        hooks.append(hook)
        return Plan(correction=Probe(), **parts)

    return make


class Watching(CallHook):
    def __init__(self):
        self.evaluations, self.befores, self.afters = [], [], []

    def evaluate(self, evaluation, proceed):
        self.evaluations.append((evaluation.index, evaluation.ordinal, evaluation.time, evaluation.x.clone()))
        return proceed(evaluation)

    def before_step(self, step):
        self.befores.append(replace(step))

    def after_step(self, step):
        self.afters.append(replace(step))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["dit", "unet", "stable-diffusion"])
def test_a_hook_that_only_looks_changes_no_bit(name, solver, plan_with):
    pipe = TINY[name]()
    parts = {"solver": DiffusersSolver(scheduler=solver), "grid": SpacingGrid(steps=4)}
    images = []
    for plan in (Plan(**parts), plan_with(Watching(), **parts)):
        with attach(pipe, plan) as handle:
            images.append(pipe(**call_arguments(pipe)).images)
    assert np.array_equal(images[0], images[1])
    assert handle.stats.nfe == (7 if solver.startswith("Heun") else 4) * (1 if name == "unet" else 2)


@pytest.mark.parametrize("name", ["dit", "unet", "stable-diffusion"])
def test_every_scheduler_shows_the_same_state(name, plan_with):
    """Euler keeps x / alpha, or x where the pipeline does not scale; the hook sees x of the process in all cases."""
    pipe = TINY[name]()
    seen = {}
    for solver in ("DDIMScheduler", "EulerDiscreteScheduler"):
        hook = Watching()
        grid = SpacingGrid(steps=4, spacing="trailing")
        with attach(pipe, plan_with(hook, solver=DiffusersSolver(scheduler=solver), grid=grid)):
            pipe(**call_arguments(pipe))
        seen[solver] = hook
    ddim, euler = seen.values()
    for attribute in ("befores", "afters"):
        for a, b in zip(getattr(ddim, attribute), getattr(euler, attribute), strict=True):
            assert (a.index, a.time, a.next_time) == (b.index, b.time, b.next_time)
            torch.testing.assert_close(a.x, b.x, rtol=0, atol=2e-4)
            torch.testing.assert_close(a.x0(), b.x0(), rtol=0, atol=2e-3)
    for a, b in zip(ddim.afters, euler.afters, strict=True):
        torch.testing.assert_close(a.x_next, b.x_next, rtol=0, atol=2e-4)
    assert [e[:3] for e in ddim.evaluations] == [(i, 0, float(t)) for i, t in enumerate((999, 749, 499, 249))]
    for evaluation, step in zip(ddim.evaluations, ddim.befores, strict=True):
        assert torch.equal(evaluation[3][: len(step.x)], step.x)


class Doubling(CallHook):
    """Replaces the state before the step and after it by twice and half of it."""

    def before_step(self, step):
        step.x, step.output = 2 * step.x, 2 * step.output

    def after_step(self, step):
        step.x_next = step.x_next / 2


@pytest.mark.parametrize("solver", ["DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("name", ["dit", "unet", "stable-diffusion"])
def test_a_first_order_step_is_linear_in_what_a_hook_replaces(name, solver, plan_with):
    pipe = TINY[name]()
    parts = {"solver": DiffusersSolver(scheduler=solver), "grid": SpacingGrid(steps=4)}
    images = []
    for plan in (Plan(**parts), plan_with(Doubling(), **parts)):
        with attach(pipe, plan):
            images.append(pipe(**call_arguments(pipe)).images)
    np.testing.assert_allclose(images[0], images[1], atol=2e-5)


class Elsewhen(CallHook):
    """Tells the network other times, one for each row."""

    def __init__(self, shift):
        self.shift = shift

    def evaluate(self, evaluation, proceed):
        return proceed(evaluation.at_times(torch.full((evaluation.rows,), evaluation.time + self.shift)))


@pytest.mark.parametrize("name", TINY)
def test_the_network_is_told_other_times_in_the_pipelines_unit(name, plan_with):
    pipe = TINY[name]()
    network = pipe.unet if "unet" in pipe.components else pipe.transformer
    told = []

    def note(module, args, kwargs):
        told.append(torch.as_tensor(kwargs["timestep"]).double())

    with network.register_forward_pre_hook(note, with_kwargs=True):
        for shift in (0.0, -7.25):
            with attach(pipe, plan_with(Elsewhen(shift), grid=SpacingGrid(steps=3))):
                pipe(**call_arguments(pipe))
    for before, after in zip(told[:3], told[3:], strict=True):
        rows = 2 if name == "unet" else 4
        torch.testing.assert_close(after, (before.reshape(-1)[0] - 7.25).expand(rows), rtol=0, atol=1e-4)


def test_units_of_time():
    assert float(time_unit(700.0, 700.0, "N")(torch.tensor(10.0))) == 10
    assert float(time_unit(700.0, 0.7, "N")(torch.tensor(10.0))) == pytest.approx(0.01)
    assert float(time_unit(700.0, 0.3, "N")(torch.tensor(10.0))) == pytest.approx(0.99)
    assert float(time_unit(996.0, 0.996 + 0.003, "N")(torch.tensor(500.0))) == 0.5, "rounded to bfloat16"
    with pytest.raises(InputError, match="N is told 3 at timestep 700; fewstep does not know this unit of time"):
        time_unit(700.0, 3.0, "N")


@pytest.mark.parametrize("solver", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_pipeline_that_starts_in_the_middle(solver, plan_with):
    """Image to image: the index is the place in the scheduler's grid, not the count of steps."""
    base = tiny_stable_diffusion()
    components = base.components | {"requires_safety_checker": False}
    pipe = StableDiffusionImg2ImgPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    hook = Watching()
    arguments = {k: v for k, v in call_arguments(base).items() if k not in ("height", "width")}
    with attach(pipe, plan_with(hook, solver=DiffusersSolver(scheduler=solver), grid=SpacingGrid(steps=5))):
        pipe(image=torch.rand(2, 3, 16, 16), strength=0.6, **arguments)
    assert [e[0] for e in hook.evaluations] == [2, 3, 4]
    assert [s.index for s in hook.befores] == [2, 3, 4]
    assert [e[2] for e in hook.evaluations] == [s.time for s in hook.befores]


def test_the_network_is_itself_outside_of_a_call(plan_with):
    pipe = tiny_dit()
    cls = type(pipe.transformer)
    during = []

    class Looking(CallHook):
        def evaluate(self, evaluation, proceed):
            during.append((type(evaluation.network), isinstance(evaluation.network, cls)))
            raise KeyboardInterrupt

    with attach(pipe, plan_with(Looking(), grid=SpacingGrid(steps=2))):
        assert type(pipe.transformer) is cls
        with pytest.raises(KeyboardInterrupt):
            pipe(**call_arguments(pipe))
        assert type(pipe.transformer) is cls
    assert during[0][1]
    assert during[0][0] is not cls


def test_threads_that_share_a_network_do_not_see_each_other(plan_with):
    """One runs a hook that doubles what the network says; the other runs the pipeline as it is, meanwhile."""
    first, second = tiny_dit(), tiny_dit()
    second.register_modules(transformer=first.transformer)
    plain = second(**call_arguments(second), num_inference_steps=6).images
    inside, done = threading.Event(), threading.Event()

    class Louder(CallHook):
        def evaluate(self, evaluation, proceed):
            inside.set()
            assert done.wait(60)
            output = proceed(evaluation)
            return type(output)(sample=2 * output.sample)

    def run():
        with attach(first, plan_with(Louder(), grid=SpacingGrid(steps=2))):
            first(**call_arguments(first))

    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(60)
    assert np.array_equal(second(**call_arguments(second), num_inference_steps=6).images, plain)
    done.set()
    thread.join()
    assert type(first.transformer).__call__ is torch.nn.Module.__call__


def test_a_plan_without_hooks_runs_on_a_scheduler_that_has_no_process():
    pipe = tiny_sd3()
    with attach(pipe, Plan(grid=SpacingGrid(steps=2))) as handle:
        pipe(**call_arguments(pipe))
    assert handle.stats.nfe == 4


def test_unet_alone_in_a_pipeline_of_another_batch_size():
    pipe = tiny_unet()
    with attach(pipe, Plan(grid=SpacingGrid(steps=2))) as handle:
        for batch in (1, 3):
            pipe(**call_arguments(pipe, batch))
            assert handle.stats.rows == 2 * batch


@pytest.mark.parametrize("solver", ["EulerAncestralDiscreteScheduler", "DDPMScheduler", "LCMScheduler"])
@pytest.mark.parametrize("name", ["dit", "unet", "stable-diffusion"])
def test_noise_of_the_solver_comes_from_the_calls_generators(name, solver):
    """DiTPipeline hands its scheduler no generator; the noise would be the global one's, and no image reproducible."""
    pipe = TINY[name]()
    plan = Plan(solver=DiffusersSolver(scheduler=solver), grid=SpacingGrid(steps=4))
    state = torch.get_rng_state()
    with attach(pipe, plan):
        together = pipe(**call_arguments(pipe)).images
        assert np.array_equal(pipe(**call_arguments(pipe)).images, together)
        first = call_arguments(pipe)
        alone = pipe(**{key: _first(value) for key, value in first.items()}).images
    np.testing.assert_allclose(alone[0], together[0], atol=2e-5)
    assert torch.equal(torch.get_rng_state(), state)


def _first(value):
    """The argument for the first sample of two."""
    if isinstance(value, torch.Tensor | list):
        return value[:1]
    return 1 if value == 2 else value
