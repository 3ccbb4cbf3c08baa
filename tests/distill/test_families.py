"""Methods train, ship and sample students of every family of pipelines: mechanism, on tiny networks."""

from functools import cache

import pytest
import torch
from toy_method import fresh_accelerator, options
from zoo import ZOO

from fewstep.distill import methods as _methods  # noqa: F401  (registers them)
from fewstep.distill.course import student_plans
from fewstep.distill.encode import encode
from fewstep.distill.export import Student, call_arguments, export_student, origin
from fewstep.distill.guiding import guiding, refuse_unseen_guidance
from fewstep.distill.loop import Loop
from fewstep.distill.lora import LoraSetting
from fewstep.distill.method import METHODS, seed_of
from fewstep.distill.options import DistillOptions
from fewstep.distill.shift import process_of_call
from fewstep.distill.sources import Batch
from fewstep.distill.team import make_team
from fewstep.samplers import Plan, attach
from fewstep.samplers.errors import InputError

FAMILIES = ("stable-diffusion", "sdxl", "sd3", "pixart-sigma", "dit", "flux", "wan", "qwen-image")
HYPER = {
    "lcm-lora": {"grid_steps": 8},
    "dmd2": {"student_steps": 2, "gan_weight": 0.1, "feature_maps": 1},
    "guided-lora": {},
    "pcm": {"grid_steps": 8, "phases": 2},
}
STEPS = 2


@cache
def told(name):
    """Condition of four samples of a family, its guidance, and its process, as its own call says."""
    family = ZOO[name]
    pipe = family.build()
    arguments = family.arguments(pipe, 4, 0)
    guided = guiding(pipe, getattr(pipe, family.denoiser), METHODS["lcm-lora"](), Plan(), arguments)
    arguments |= guided.told
    return encode(pipe, arguments), guided, process_of_call(pipe, arguments)


class FamilySource:
    """Random clean samples of a family."""

    def __init__(self, condition):
        self.condition = condition

    def batch(self, index, positions):
        numbers = [10 * index + position for position in positions]
        draws = [torch.Generator().manual_seed(seed_of(number)) for number in numbers]
        x0 = torch.stack([torch.randn(self.condition.layout.shape, generator=draw) for draw in draws])
        return Batch(torch.tensor(numbers), self.condition.rows([number % 4 for number in numbers]), x0)


@pytest.mark.parametrize("method_name", HYPER)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_of_a_family(name, method_name, tmp_path):
    family, (condition, guided, process), method = ZOO[name], told(name), METHODS[method_name](**HYPER[method_name])
    if method.learns_guidance and guided.inside is not None:
        with pytest.raises(InputError, match="FluxPipeline does not guide by an unconditional branch, so guided-lora"):
            refuse_unseen_guidance(condition.layout, guided, method)
        return
    refuse_unseen_guidance(condition.layout, guided, method)
    pipe = family.build()
    base = origin(pipe)
    plans = student_plans(
        method, DistillOptions(output_dir=tmp_path, num_inference_steps=STEPS), process, guided.inside
    )
    team = make_team(getattr(pipe, family.denoiser), process, method, LoraSetting(2, 4.0), guided.scale)
    settings = options(tmp_path, 2, learning_rate=0.05, train_batch_size=2, checkpointing_steps=100)
    Loop(method, team, FamilySource(condition), settings, fresh_accelerator(settings)).run()
    export_student(Student(pipe, family.denoiser, team, "student", method, plans), tmp_path, base=base)

    stock = family.build()
    arguments = family.arguments(stock, 2, 0)
    plan = Plan.load(tmp_path / "plan.json")
    with attach(stock, plan) as fast:
        student = next(iter(stock(**call_arguments(plan, arguments)).values()))
    assert fast.warnings == ()
    assert fast.stats.nfe == STEPS
    bare = plan.model_copy(update={"weights": (), "tuned_for": None})
    with attach(stock, bare):
        teacher = next(iter(stock(**call_arguments(plan, arguments | family.arguments(stock, 2, 0))).values()))
    student, teacher = torch.as_tensor(student), torch.as_tensor(teacher)
    assert student.shape == teacher.shape
    assert student.isfinite().all()
    assert not torch.equal(student, teacher)
