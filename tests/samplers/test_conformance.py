"""The shipped conformance tests, on every part and every explicit grid that fewstep registers."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.utils import is_torchsde_available
from tiny import call_arguments, tiny_dit

from fewstep.samplers import (
    AdaptiveSteps,
    Aligner,
    AnalyticInit,
    ConstantGuidance,
    DiffusersSolver,
    EpsilonScaling,
    Escalate,
    ExplicitGrid,
    GuidanceSchedule,
    KnowledgeBase,
    ModelSwitch,
    Part,
    Plan,
    ReDi,
    RuleGrid,
    SpacingGrid,
    StartStatistics,
    TimeShift,
    attach,
)
from fewstep.samplers.explicit import EXPLICIT
from fewstep.samplers.part import Slot
from fewstep.samplers.testing import ExplicitGridConformance, PartConformance, slot_of


def brightness(samples, conditions):
    return samples.double().flatten(1).mean(1)


def second_network():
    network = tiny_dit().transformer
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.9)
    return network


def knowledge_base():
    draw = torch.Generator().manual_seed(0)
    keys, corrections = torch.randn(2, 5, 4, 4, 4, generator=draw).half()
    return KnowledgeBase(keys, corrections, None, (980.0, 960.0, 940.0), "")


@dataclass(frozen=True)
class Case:
    """A part, what it asks for by name, and arguments of the call that it leaves to the user."""

    part: Part
    resources: Callable[[], dict] = dict
    call: dict = field(default_factory=dict)


CASES = [
    Case(DiffusersSolver(scheduler="EulerDiscreteScheduler")),
    Case(DiffusersSolver(scheduler="EulerAncestralDiscreteScheduler")),
    Case(SpacingGrid(steps=3, spacing="linspace")),
    Case(ExplicitGrid(timesteps=(990, 505.5, 20))),
    Case(RuleGrid(rule="karras", steps=3, options={"rho": 5.0})),
    Case(
        AdaptiveSteps(
            grids=(ExplicitGrid(timesteps=(999, 300)), RuleGrid(rule="power", steps=3)),
            table={"0": (1.0, 0.0), "1": (0.0, 2.0)},
        )
    ),
    Case(AnalyticInit(), lambda: {"start_statistics": StartStatistics(torch.zeros(4, 4, 4), 0.3, 100, "")}),
    Case(ReDi(key_step=2), lambda: {"knowledge_base": knowledge_base()}),
    Case(ConstantGuidance(scale=2.0)),
    Case(GuidanceSchedule(scale=3.0, window=(0.0, 0.5))),
    Case(TimeShift(window=40, cutoff=100)),
    Case(Aligner(ratios=(1.01, 0.99, 1.0))),
    Case(EpsilonScaling(scale=1.01)),
    Case(
        ModelSwitch(networks=("self", "small"), steps=(2,)),
        lambda: {"small": second_network()},
        {"num_inference_steps": 3},
    ),
    Case(
        Escalate(teacher=Plan(grid=SpacingGrid(steps=4)).to_json(), strength=0.5, threshold=0.5),
        lambda: {"scorer": brightness},
        {"num_inference_steps": 3},
    ),
]

NEED_TORCHSDE = {"CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"}
OPTIONS = {
    "DDIMScheduler": {"clip_sample": False},
    "DDIMParallelScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "DDPMParallelScheduler": {"clip_sample": False},
    "EulerDiscreteScheduler": {"prediction_type": "v_prediction"},
    "PNDMScheduler": {"set_alpha_to_one": True},
}
SCHEDULERS = [
    getattr(diffusers, name)(**OPTIONS.get(name, {}))
    for name in EXPLICIT.names()
    if is_torchsde_available() or name not in NEED_TORCHSDE
]
SCHEDULERS += [diffusers.PNDMScheduler(set_alpha_to_one=True, skip_prk_steps=True)]
GRIDS = {
    "CosineDPMSolverMultistepScheduler": (0.995, 0.96, 0.7, 0.431, 0.25),
    "EDMDPMSolverMultistepScheduler": (0.96, 0.7, 0.1, -0.4, -1.25),
    "EDMEulerScheduler": (0.96, 0.7, 0.1, -0.4, -1.25),
    "IPNDMScheduler": (0.96, 0.7, 0.431, 0.102, 0.014),
}
STOPS = {"DEISMultistepScheduler": 0.0, "SASolverScheduler": 0.0, "TCDScheduler": 0.0}


class TestParts(PartConformance):
    @pytest.fixture(autouse=True, params=CASES, ids=lambda case: case.part.type)
    def _choose(self, request):
        self.chosen = request.param

    def part(self):
        return self.chosen.part

    def pipe(self):
        return tiny_dit()

    def call(self, pipe):
        return call_arguments(pipe) | self.chosen.call

    def resources(self):
        return self.chosen.resources()


def digests():
    """Of the images of every part, in this process."""
    found = []
    for case in CASES:
        pipe = tiny_dit()
        with attach(pipe, Plan(**{slot_of(case.part): case.part}), case.resources()):
            images = pipe(**call_arguments(pipe) | case.call).images
        found.append(hashlib.sha256(images.tobytes()).hexdigest())
    return found


def test_seeds_reproduce_in_another_process():
    script = "import test_conformance; print(*test_conformance.digests())"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "7"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300, check=True
    )
    assert run.stdout.split() == digests()


class TestExplicitGrids(ExplicitGridConformance):
    @pytest.fixture(autouse=True, params=SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
    def _choose(self, request):
        self.chosen = request.param
        name = type(self.chosen).__name__
        self.grid, self.stops = GRIDS.get(name, self.grid), STOPS.get(name)

    def scheduler(self):
        return type(self.chosen).from_config(self.chosen.config)


def test_every_registered_part_is_tested():
    registered = {
        slot.registry[name]
        for info in Plan.model_fields.values()
        for slot in info.metadata
        if isinstance(slot, Slot)
        for name in slot.registry.names()
    }
    assert registered == {type(case.part) for case in CASES}


def test_every_explicit_grid_is_tested():
    missing = set(EXPLICIT.names()) - {type(scheduler).__name__ for scheduler in SCHEDULERS}
    assert missing == (set() if is_torchsde_available() else NEED_TORCHSDE)
