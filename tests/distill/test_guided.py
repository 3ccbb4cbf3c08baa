"""Guided distillation: the goal is the pipeline's own guidance, and the student is told what it was."""

import pytest
import torch
from method_cases import TinySource, team_of
from tiny import call_arguments, tiny_dit, tiny_stable_diffusion

from fewstep.distill.encode import encode
from fewstep.distill.guidance_embedding import told
from fewstep.distill.method import Moment
from fewstep.distill.methods import Guided, GuidedLora
from fewstep.distill.sources import Batch
from fewstep.distill.team import make_team, noise_like
from fewstep.distill.times import Range, UniformTimes
from fewstep.samplers import InputError, Process, attach


def moment(rows=2):
    return Moment(0, 0, 0, 0, ("student",), 5, range(rows))


def states(process, batch, drawn):
    t = UniformTimes()(process, len(batch), drawn.generators)
    return t, process.add_noise(batch.x0, noise_like(batch.x0, drawn), t)


def test_the_goal_is_the_guided_network():
    """Against guidance written out on the network's own output, v, which the tiny DiT gives."""
    method = Guided(embed_guidance=False, guidance_scale=(3.0,))
    team, batch = team_of(method, lora=False), TinySource().batch(0, range(2))
    (loss,) = method.losses(batch, team, moment())
    t, x_t = states(team.process, batch, moment())
    labels = batch.condition.cond.inputs["class_labels"]
    with torch.no_grad():
        base = tiny_dit().transformer
        cond, uncond = (base(x_t, t.float(), classes).sample for classes in (labels, torch.full_like(labels, 1000)))
        with team.roles.use("student") as network:
            student = network(x_t, t.float(), labels).sample
    wanted = (student - uncond - 3 * (cond - uncond)).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(loss.value.detach(), wanted, rtol=1e-4, atol=1e-6)


def embedded(guidance_scale=()):
    pipe, method = tiny_stable_diffusion(), Guided(guidance_scale=guidance_scale)
    arguments = call_arguments(pipe) | {"guidance_scale": 2.0}
    condition = encode(pipe, arguments)
    team = make_team(pipe.unet, Process.from_scheduler(pipe.scheduler), method, None, guidance=4.0)
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe, method, team, Batch(torch.arange(2), condition, x0)


def test_an_embedded_student_learns_the_guidance_of_its_scale():
    """It begins as the unguided teacher, and is compared with the teacher guided by what it is told."""
    _, method, team, batch = embedded((2.0, 5.0))
    drawn = moment()
    scales = Range(2.0, 5.0)(2, drawn.generators)
    t, x_t = states(team.process, batch, drawn)
    condition = told(batch.condition, scales)
    with torch.no_grad():
        goal = team.guided("teacher", batch.condition, scales)(x_t, t)
        begun = team.denoiser("student", condition)(x_t, t)
        assert torch.equal(begun.x0, team.denoiser("teacher", batch.condition)(x_t, t).x0)
        team.trainable("student")["time_embedding.cond_proj.weight"].normal_(generator=torch.Generator().manual_seed(1))
        student = team.denoiser("student", condition)(x_t, t)
    outs = [
        team.process.convert(team.process.from_x0(pair.x0, x_t, t), x_t, t, "v_prediction")
        for pair in (goal, student, begun)
    ]
    (loss,) = method.losses(batch, team, moment())
    wanted = (outs[0] - outs[1]).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(loss.value.detach(), wanted, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(outs[1], outs[2], rtol=1e-3)


def test_an_embedded_student_is_sampled_at_the_pipelines_scale_in_one_evaluation():
    pipe, method, team, _ = embedded()
    plan = method.plan(team.process, 3)
    assert plan.guidance is None
    assert not method.guidance_in_student
    with team.roles.use("student", frozen=True, grad=False) as network:
        pipe.unet = network
        with attach(pipe, plan) as fast:
            pipe(**call_arguments(pipe), guidance_scale=4.0)
    assert [step.evaluations for step in fast.stats.steps] == [1, 1, 1]


def test_what_cannot_be_told_is_refused():
    with pytest.raises(
        ValueError, match=r"without embed_guidance there is one guidance scale; got the range \[1.0, 3.0\]"
    ):
        GuidedLora(guidance_scale=(1.0, 3.0))
    process = Process.from_scheduler(tiny_dit().scheduler)
    with pytest.raises(InputError, match="DiTTransformer2DModel has no input for the guidance scale"):
        make_team(tiny_dit().transformer, process, Guided(), None, 2.0)


def test_a_pipeline_without_guidance_is_refused():
    method = GuidedLora()
    team = team_of(method, lora=True)
    condition = encode(tiny_dit(), {"class_labels": [0, 1], "guidance_scale": 1.0})
    with pytest.raises(InputError, match="DiTPipeline was called without guidance, so there is no unconditional"):
        next(method.losses(Batch(torch.arange(2), condition, torch.zeros(2, 4, 4, 4)), team, moment()))
