"""What a teacher is guided by, and the shift of its times, are those of the pipeline's own calls."""

import pytest
import torch
from method_cases import METHODS
from tiny import tiny_dit, tiny_sd3, tiny_unet
from zoo import ZOO

from fewstep.distill import methods as _methods  # noqa: F401  (registers them)
from fewstep.distill.guiding import guiding
from fewstep.distill.shift import process_of_call
from fewstep.samplers import Plan, Process
from fewstep.samplers.errors import InputError


def plan(**guidance):
    return Plan.from_json({"fewstep_plan": 1, "guidance": guidance})


SCHEDULE = {"type": "guidance", "scale": 2.5}


def found(pipe, name="lcm", teacher=None, call=None, **hyper):
    network = pipe.components.get("transformer") or pipe.components["unet"]
    return guiding(pipe, network, METHODS[name](**hyper), teacher or Plan(), call or {})


def test_the_plan_goes_before_the_call_and_the_call_before_the_default():
    pipe = tiny_dit()
    call = {"guidance_scale": 3.0}
    assert found(pipe).scale == 4.0  # of DiTPipeline
    assert found(pipe, call=call).scale == 3.0
    assert found(pipe, call=call, teacher=plan(type="constant", scale=2.0)).scale == 2.0
    assert found(pipe, teacher=plan(**SCHEDULE)).scale == 2.5
    assert found(tiny_unet()).told == {}
    assert found(tiny_unet()).scale == 1.0


def test_pipelines_are_told_to_show_both_branches():
    pipe = tiny_dit()
    assert found(pipe, guidance_scale=(1.0, 9.0)).told == {"guidance_scale": 4.0}
    off = plan(type="constant", scale=1.0)
    assert found(pipe, teacher=off).told == {"guidance_scale": 1.0}
    assert found(pipe, teacher=off, guidance_scale=(1.0, 9.0)).told == {"guidance_scale": 9.0}
    assert found(pipe, teacher=off, guidance_scale=(1.0, 9.0)).scale == 1.0


def test_networks_that_guide_inside_are_told_one_scale():
    pipe = ZOO["flux"].build()
    guided = found(pipe)
    assert (guided.scale, guided.inside, guided.told) == (1.0, 3.5, {"guidance_scale": 3.5})
    assert found(pipe, call={"guidance_scale": 2.0}).inside == 2.0
    assert found(pipe, teacher=plan(type="constant", scale=5.0)).inside == 5.0
    assert found(pipe, guidance_scale=(6.0,)).told == {"guidance_scale": 6.0}
    with pytest.raises(InputError, match="FluxPipeline would guide inside its network and by true_cfg_scale at once"):
        found(pipe, call={"true_cfg_scale": 3.0})
    with pytest.raises(InputError, match="told one guidance scale for all its samples; give --guid"):
        found(pipe, guidance_scale=(1.0, 6.0))


def test_a_true_scale_is_that_of_the_branches():
    pipe = ZOO["qwen-image"].build()
    assert found(pipe).told == {"true_cfg_scale": 4.0}
    assert found(pipe, teacher=plan(**SCHEDULE)).scale == 2.5


def test_other_conventions_of_guidance_are_refused():
    with pytest.raises(
        InputError, match=r"ZImagePipeline guides by cond \+ scale \(cond - uncond\), which is guidance"
    ):
        found(ZOO["z-image"].build())


def test_pairs_have_any_guidance_of_their_teacher():
    window = plan(**SCHEDULE, window=[0, 0.5])
    assert found(tiny_dit(), "reflow", teacher=window).scale == 4.0
    with pytest.raises(InputError, match="changes over the steps; a student learns one scale"):
        found(tiny_dit(), teacher=window)


@pytest.mark.parametrize("size", [16, 32])
def test_times_are_shifted_as_the_pipeline_does_at_that_size(size):
    family = ZOO["flux"]
    pipe = family.build()
    arguments = family.arguments(pipe, 1, 0) | {"height": size, "width": size}
    process = process_of_call(pipe, arguments)
    assert "set_timesteps" not in vars(pipe.scheduler)
    pipe(**arguments | {"num_inference_steps": 4})
    wanted = process.from_uniform(torch.linspace(1, 1 / 4, 4, dtype=torch.float64))
    torch.testing.assert_close(pipe.scheduler.timesteps.double(), wanted, rtol=1e-5, atol=0)


def test_other_processes_are_those_of_their_schedulers():
    for pipe in (tiny_dit(), tiny_sd3()):
        assert process_of_call(pipe, {}) == Process.from_scheduler(pipe.scheduler)
