"""The shipped conformance tests, on every part and every explicit grid that fewstep registers."""

import diffusers
import pytest
from diffusers.utils import is_torchsde_available
from tiny import call_arguments, tiny_dit

from fewstep.samplers import ConstantGuidance, DiffusersSolver, ExplicitGrid, GuidanceSchedule, Plan, SpacingGrid
from fewstep.samplers.explicit import EXPLICIT
from fewstep.samplers.part import Slot
from fewstep.samplers.testing import ExplicitGridConformance, PartConformance

PARTS = [
    DiffusersSolver(scheduler="EulerDiscreteScheduler"),
    SpacingGrid(steps=3, spacing="linspace"),
    ExplicitGrid(timesteps=(990, 505.5, 20)),
    ConstantGuidance(scale=2.0),
    GuidanceSchedule(scale=3.0, window=(0.0, 0.5)),
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
    assert registered == {type(part) for part in PARTS}


def test_every_explicit_grid_is_tested():
    missing = set(EXPLICIT.names()) - {type(scheduler).__name__ for scheduler in SCHEDULERS}
    assert missing == (set() if is_torchsde_available() else NEED_TORCHSDE)
