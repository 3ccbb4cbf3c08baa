"""What a call of a pipeline gives depends on nothing that was done with the pipeline before."""

import inspect
import random
import warnings
from dataclasses import dataclass, field
from functools import partial

import diffusers
import pytest
import torch
from cache_parts import makers_of
from support_matrix import columns
from zoo import ZOO

from fewstep.samplers import InputError, Plan, PlanWarning, attach

SEQUENCES = 50
STEPS = (2, 3)
PARALLEL = ("DDIMParallelScheduler", {})
DPM = ("DPMSolverMultistepScheduler", {})
SHIFTED = ("FlowMatchEulerDiscreteScheduler", {"shift": 1.5})
FLOW_DPM = ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True})
SCHEDULERS = {
    "ddim": (PARALLEL, ("DDIMScheduler", {"timestep_spacing": "trailing"})),
    "stable-diffusion": (DPM, ("EulerDiscreteScheduler", {})),
    "dit": (DPM, ("DDIMScheduler", {"timestep_spacing": "trailing"})),
    "pixart-sigma": (("DDIMScheduler", {"clip_sample": False}), ("EulerDiscreteScheduler", {})),
    "sd3": (SHIFTED,),
    "sana": (SHIFTED, FLOW_DPM),
    "flux": (SHIFTED,),
    "cogvideox": (("CogVideoXDDIMScheduler", {"timestep_spacing": "linspace"}), ("DDIMScheduler", {})),
    "wan": (SHIFTED, FLOW_DPM),
    "cogview4": (SHIFTED,),
}
"""The families, and the schedulers that are put in place of a pipeline's own."""


class Stop(Exception):
    """What ends a call in the middle."""


@dataclass
class Scene:
    """A pipeline with all that was done with it that a fresh one must repeat, and how it is called next."""

    family: object
    rng: random.Random
    makers: dict
    done: list = field(default_factory=list)
    changes: list = field(default_factory=list)
    aborted: int = 0
    plan: Plan | None = None
    handle: object = None
    batch: int = 1
    steps: int = 3
    size: int = 16

    def __post_init__(self):
        self.pipe = self.family.build()
        self.taken = set(inspect.signature(type(self.pipe).__call__).parameters)
        sized = {"height": self.size, "width": self.size}.items() <= self.family.arguments(self.pipe, 1, 0).items()
        self.sizes = (16, 32) if sized else ()

    def call(self, pipe, **more):
        """What a call gives; the words of the error where a plan refuses it."""
        size = {"height": self.size, "width": self.size} if self.sizes else {}
        latent = {"output_type": "latent"} if self.sizes else {}
        try:
            return self.family.call(pipe, self.batch, steps=self.steps, **size, **latent, **more)
        except InputError as error:
            return str(error)

    def fresh(self):
        """A new pipeline after the same changes of its weights and of its scheduler."""
        pipe = self.family.build()
        for change in self.changes:
            change(pipe)
        return pipe

    def changed(self, change):
        self.changes.append(change)
        change(self.pipe)

    def operations(self):
        """What can be done next."""
        found = [self.run, self.abort, self.change_batch, self.change_steps, self.change_weight]
        if "callback_on_step_end" in self.taken:
            found += [self.abort_between_steps, self.interrupt]
        if self.sizes:
            found.append(self.change_size)
        return found + ([self.detach] if self.handle else [self.attach] * 4 + [self.change_scheduler])

    def attach(self):
        name = self.rng.choice(list(self.makers))
        self.plan = Plan(caches=self.makers[name](self.pipe, self.steps))
        self.handle = attach(self.pipe, self.plan)
        return name

    def detach(self):
        self.handle.detach()
        self.handle = self.plan = None

    def run(self):
        self.call(self.pipe)

    def abort(self):
        """A module raises at one of its calls, if it is called so often."""
        network = getattr(self.pipe, self.family.denoiser)
        name = self.rng.choice([name for name, _ in network.named_modules()])
        left = self.rng.choice([0, 1, 1, 2])

        def stop(*_):
            nonlocal left
            left -= 1
            if left < 0:
                raise Stop

        hook = network.get_submodule(name).register_forward_pre_hook(stop)
        try:
            self._stopped()
        finally:
            hook.remove()
        return name

    def abort_between_steps(self):
        def stop(*_):
            raise Stop

        self._stopped(callback_on_step_end=stop)

    def _stopped(self, **more):
        try:
            self.call(self.pipe, **more)
        except Stop:
            self.aborted += 1

    def interrupt(self):
        def interrupt(pipe, step, time, tensors):
            pipe._interrupt = True
            return tensors

        self.call(self.pipe, callback_on_step_end=interrupt)

    def change_batch(self):
        self.batch = 3 - self.batch

    def change_steps(self):
        self.steps = self.rng.choice(STEPS)
        return self.steps

    def change_size(self):
        self.size = sum(self.sizes) - self.size

    def change_weight(self):
        """As an adapter does that is loaded, scaled or fused."""
        network = getattr(self.pipe, self.family.denoiser)
        name = self.rng.choice([name for name, _ in network.named_parameters()])
        seed = self.rng.randrange(1000)
        self.changed(partial(_perturb, denoiser=self.family.denoiser, name=name, seed=seed))

    def change_scheduler(self):
        name, options = self.rng.choice(SCHEDULERS[self.family.name])
        self.changed(partial(_schedule, name=name, options=options))
        return name

    def play(self):
        """A few operations at random."""
        for _ in range(self.rng.randint(3, 6)):
            operation = self.rng.choice(self.operations())
            self.done.append((operation.__name__, operation()))


def _perturb(pipe, denoiser, name, seed):
    weight = getattr(pipe, denoiser).get_parameter(name)
    weight.data = weight + 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))


def _schedule(pipe, name, options):
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)


@pytest.fixture(scope="module")
def makers():
    return {name: makers_of(ZOO[name]) for name in SCHEDULERS}


def test_every_cache_that_works_on_a_family_is_among_them(makers):
    assert {cache for found in makers.values() for cache in found} == set(columns()) - {"host: TextKVCache"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_next_call_is_that_of_a_fresh_pipeline(name, makers):
    """After each sequence; the pipeline lives on into the next one, with all that was done with it."""
    scene, finished = Scene(ZOO[name], random.Random(name), makers[name]), 0
    with warnings.catch_warnings(action="ignore", category=PlanWarning):
        for sequence in range(SEQUENCES):
            scene.play()
            given, fresh = scene.call(scene.pipe), scene.fresh()
            with attach(fresh, scene.plan or Plan()) as handle:
                wanted = scene.call(fresh)
            assert type(given) is type(wanted), (sequence, scene.done)
            assert given == wanted if isinstance(given, str) else torch.equal(given, wanted), (sequence, scene.done)
            assert scene.handle is None or scene.handle.stats == handle.stats
            finished += not isinstance(given, str)
    assert finished > SEQUENCES / 2
    assert scene.aborted > SEQUENCES / 5
    assert {operation.__name__ for operation in scene.operations()} <= {done for done, _ in scene.done}
