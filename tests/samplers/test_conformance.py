"""The shipped conformance tests, on every part and every explicit grid that fewstep registers."""

import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny import call_arguments, tiny_dit

from fewstep.samplers import ConstantGuidance, DiffusersSolver, ExplicitGrid, Plan, SpacingGrid
from fewstep.samplers.explicit import EXPLICIT
from fewstep.samplers.part import Slot
from fewstep.samplers.testing import ExplicitGridConformance, PartConformance

PARTS = [
    DiffusersSolver(scheduler="EulerDiscreteScheduler"),
    SpacingGrid(steps=3, spacing="linspace"),
    ExplicitGrid(timesteps=(990, 505.5, 20)),
    ConstantGuidance(scale=2.0),
]

SCHEDULERS = [
    DDIMScheduler(clip_sample=False),
    DPMSolverMultistepScheduler(),
    EulerDiscreteScheduler(prediction_type="v_prediction"),
    FlowMatchEulerDiscreteScheduler(),
    UniPCMultistepScheduler(),
]


class TestParts(PartConformance):
    @pytest.fixture(autouse=True, params=PARTS, ids=lambda part: part.type)
    def _choose(self, request):
        self.chosen = request.param

    def part(self):
        return self.chosen

    def pipe(self):
        return tiny_dit()

    def call(self, pipe):
        return call_arguments(pipe)


class TestExplicitGrids(ExplicitGridConformance):
    @pytest.fixture(autouse=True, params=SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
    def _choose(self, request):
        self.chosen = request.param

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
    assert registered == {type(part) for part in PARTS}


def test_every_explicit_grid_is_tested():
    assert EXPLICIT.names() == sorted(type(scheduler).__name__ for scheduler in SCHEDULERS)
