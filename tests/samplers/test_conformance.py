"""The shipped conformance tests, on every part and every explicit grid that fewstep registers."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import is_torchsde_available
from tiny import call_arguments, tiny_dit, tiny_stable_diffusion, tiny_unet

from fewstep.samplers import (
    AdaptiveSteps,
    Aligner,
    AnalyticInit,
    BlockMask,
    ConstantGuidance,
    CrossAttentionFreeze,
    DiffusersSolver,
    EpsilonScaling,
    Escalate,
    ExplicitGrid,
    Gate,
    GuidanceSchedule,
    HostCache,
    KnowledgeBase,
    LoraWeights,
    ModelSwitch,
    Part,
    Plan,
    ReDi,
    Router,
    RuleGrid,
    SpacingGrid,
    StartStatistics,
    StepRehash,
    StudentWeights,
    TimeShift,
    UNetDeep,
    attach,
)
from fewstep.samplers.explicit import EXPLICIT
from fewstep.samplers.files import write_tensors
from fewstep.samplers.layer_skip import LayerSkip
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
    """A part, what it asks for by name, the call's arguments that it leaves to the user, a pipeline, and its files."""

    part: Part
    resources: Callable[[], dict] = dict
    call: dict = field(default_factory=dict)
    pipe: Callable[[], Any] = tiny_dit
    files: Callable[[Path], Any] | None = None


def low_rank(folder):
    draw = torch.Generator().manual_seed(1)
    key = "transformer.transformer_blocks.0.attn1.to_q"
    tensors = {f"{key}.lora_{side}.weight": torch.randn(shape, generator=draw) for side, shape in LOW_RANK.items()}
    write_tensors(folder / "pytorch_lora_weights.safetensors", tensors)


def tiny_blocks():
    return tiny_dit(layers=3)


LOW_RANK = {"A": (2, 16), "B": (16, 2)}
THREE = {"num_inference_steps": 3}
FIVE = {"num_inference_steps": 5}
EVERY_SECOND = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": [-1, 1001]}
TAYLOR = {
    "cache_interval": 3,
    "disable_cache_before_step": 2,
    "taylor_factors_dtype": "float32",
    "cache_identifiers": ["transformer_blocks[.][0-9]+[.]attn1"],
}


CASES = [
    Case(LoraWeights(scale=0.5), call=FIVE, files=low_rank),
    Case(
        StudentWeights(),
        call=FIVE,
        files=lambda folder: second_network().save_pretrained(folder / "transformer"),
    ),
    Case(DiffusersSolver(scheduler="EulerDiscreteScheduler"), call=FIVE),
    Case(DiffusersSolver(scheduler="EulerAncestralDiscreteScheduler"), call=FIVE),
    Case(SpacingGrid(steps=3, spacing="linspace")),
    Case(ExplicitGrid(timesteps=(990, 505.5, 20))),
    Case(RuleGrid(rule="karras", steps=3, options={"rho": 5.0})),
    Case(
        AdaptiveSteps(
            grids=(ExplicitGrid(timesteps=(999, 300)), RuleGrid(rule="power", steps=3)),
            table={"0": (1.0, 0.0), "1": (0.0, 2.0)},
        )
    ),
    Case(AnalyticInit(), lambda: {"start_statistics": StartStatistics(torch.zeros(4, 4, 4), 0.3, 100, "")}, FIVE),
    Case(ReDi(key_step=2), lambda: {"knowledge_base": knowledge_base()}),
    Case(ConstantGuidance(scale=2.0), call=FIVE),
    Case(GuidanceSchedule(scale=3.0, window=(0.0, 0.5)), call=FIVE),
    Case(TimeShift(window=40, cutoff=100), call=FIVE),
    Case(TimeShift(window=60, criterion="paper", variant="adm"), call=FIVE, pipe=tiny_unet),
    Case(Aligner(ratios=(1.01, 0.99, 1.0))),
    Case(Aligner(ratios=(1.01, 0.98, 1.03, 0.95)), pipe=tiny_unet),
    Case(EpsilonScaling(scale=1.01), call=FIVE),
    Case(EpsilonScaling(scale=1.01, slope=0.02), call=FIVE, pipe=tiny_unet),
    Case(
        ModelSwitch(networks=("self", "small"), steps=(2,)),
        lambda: {"small": second_network()},
        THREE,
    ),
    Case(
        Escalate(teacher=Plan(grid=SpacingGrid(steps=4)).to_json(), strength=0.5, threshold=0.5),
        lambda: {"scorer": brightness},
        THREE,
    ),
    Case(
        BlockMask(rows=("111111", "011011", "100100"), targets=("attention", "mlp"), order=1),
        call=THREE,
        pipe=tiny_blocks,
    ),
    Case(LayerSkip(rows=("011", "110", "101")), call=THREE, pipe=tiny_blocks),
    Case(LayerSkip(rows=("0", "1", "1"), targets=("attention",)), call=THREE, pipe=tiny_stable_diffusion),
    Case(Router(probabilities=((1.0, 1.0), (0.05, 0.9), (0.9, 0.1))), call=THREE),
    Case(StepRehash(changes=(0.2, 0.1), threshold=0.15), call=THREE),
    Case(Gate(threshold=0.4, max_skips=2), call=FIVE, pipe=tiny_blocks),
    Case(
        Gate(threshold=0.9, criterion="modulated-input", coefficients=(2.0, 1.0, 0.0), last_steps=1),
        call=FIVE,
        pipe=tiny_blocks,
    ),
    Case(HostCache(config="PyramidAttentionBroadcastConfig", options=EVERY_SECOND), call=THREE),
    Case(HostCache(config="TaylorSeerCacheConfig", options=TAYLOR), call=FIVE, pipe=tiny_blocks),
    Case(UNetDeep(interval=2), call=FIVE, pipe=lambda: tiny_unet(layers=2)),
    Case(UNetDeep(interval=3, schedule="quadratic", depth=1, layer=None), call=FIVE, pipe=tiny_stable_diffusion),
    Case(CrossAttentionFreeze(after=2), call=FIVE, pipe=tiny_stable_diffusion),
    Case(CrossAttentionFreeze(fraction=0.5), call=FIVE, pipe=tiny_stable_diffusion),
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
    def _choose(self, request, tmp_path):
        self.chosen, self.scratch = request.param, tmp_path
        if self.chosen.files is not None:
            self.chosen.files(tmp_path)

    def part(self):
        return self.chosen.part

    def pipe(self):
        return self.chosen.pipe()

    def call(self, pipe):
        return call_arguments(pipe) | self.chosen.call

    def resources(self):
        return self.chosen.resources()

    def folder(self):
        return None if self.chosen.files is None else self.scratch


def digests(scratch):
    """Of the images of every part, in this process."""
    found = []
    for case in CASES:
        pipe, plan = case.pipe(), Plan(**{slot_of(case.part): case.part})
        if case.files is not None:
            case.files(scratch)
            plan.save(scratch / "plan.json")
            plan = Plan.load(scratch / "plan.json")
        with attach(pipe, plan, case.resources()):
            images = pipe(**call_arguments(pipe) | case.call).images
        found.append(hashlib.sha256(images.tobytes()).hexdigest())
    return found


def test_seeds_reproduce_in_another_process(tmp_path):
    script = f"import pathlib, test_conformance; print(*test_conformance.digests(pathlib.Path({str(tmp_path)!r})))"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "7"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300, check=True
    )
    assert run.stdout.split() == digests(tmp_path)


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
