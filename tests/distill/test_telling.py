"""Methods whose student may be told the guidance scale: it is told that of its own goal."""

import pytest
import torch
from method_cases import CASES
from tiny import call_arguments, tiny_stable_diffusion

import fewstep.distill.team as team_module
from fewstep.distill.encode import encode
from fewstep.distill.guidance_embedding import told
from fewstep.distill.lora import LoraSetting
from fewstep.distill.method import METHODS, Moment
from fewstep.distill.methods.telling import Telling
from fewstep.distill.sources import Batch
from fewstep.distill.team import make_team
from fewstep.samplers import InputError, Process

NAMES = [
    name
    for name in METHODS.names()
    if issubclass(METHODS[name], Telling) and METHODS[name].model_fields["embed_guidance"].annotation is bool
]
TELLING = pytest.mark.parametrize("name", NAMES)


def embedding(name, **options):
    return METHODS[name](**CASES[name].options | {"embed_guidance": True, "guidance_scale": ()} | options)


def prepared(method, lora=None):
    pipe = tiny_stable_diffusion()
    condition = encode(pipe, call_arguments(pipe, batch=3) | {"guidance_scale": 2.0})
    team = make_team(pipe.unet, Process.from_scheduler(pipe.scheduler), method, lora, guidance=4.0)
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return team, Batch(torch.arange(3), condition, x0)


def test_the_methods_of_guidance_are_among_them():
    assert {"guided", "lcm"} <= set(NAMES)
    assert not {"guided-lora", "lcm-lora"} & set(NAMES)


@TELLING
@pytest.mark.parametrize(("ends", "low", "high"), [((), 1.0, 8.0), ((2.0, 5.0), 2.0, 5.0)])
def test_the_student_is_told_the_scale_of_its_teacher(name, ends, low, high, monkeypatch):
    """So is its target, and nothing else is changed; the layer that listens learns."""
    method = embedding(name, guidance_scale=ends)
    team, batch = prepared(method)
    scales, vectors = [], []
    predict, guided = team_module.predict, team_module.guided

    def seen(network, process, x, t, condition):
        vectors.append(condition.cond.inputs["timestep_cond"])
        return predict(network, process, x, t, condition)

    def seen_guided(network, process, x, t, condition, scale):
        scales.append(scale)
        return guided(network, process, x, t, condition, scale)

    monkeypatch.setattr(team_module, "predict", seen)
    monkeypatch.setattr(team_module, "guided", seen_guided)
    updates = method.turns().stages[0].cycle[0]
    loss = next(method.losses(batch, team, Moment(0, 0, 0, 0, updates, 5, range(3))))
    loss.value.mean().backward()
    (scale,) = scales
    assert scale.unique().numel() == 3
    assert low <= scale.min() < scale.max() <= high
    wanted = told(batch.condition, scale).cond.inputs["timestep_cond"]
    assert vectors
    assert all(torch.equal(vector, wanted) for vector in vectors)
    assert team.trainable("student")["time_embedding.cond_proj.weight"].grad.abs().max() > 0


def test_a_teacher_that_is_told_predicts_what_it_did():
    method = embedding("lcm")
    team, batch = prepared(method)
    drawn, decided = method.drawn(batch, team, Moment(0, 0, 0, 0, ("student",), 5, range(3)))
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([20.0, 500.0, 999.0])
    scale = decided.scales((), 3, torch.Generator())
    plain, aware = (
        each("teacher", condition, scale)(x, t)
        for each, condition in ((team.guided, batch.condition), (decided.guided, drawn.condition))
    )
    assert torch.equal(plain.x0, aware.x0)


@TELLING
def test_it_is_sampled_at_the_pipelines_scale(name):
    assert not embedding(name).guidance_in_student
    assert METHODS[name](**CASES[name].options | {"embed_guidance": False}).guidance_in_student


@TELLING
def test_what_cannot_be_told_is_refused(name):
    with pytest.raises(
        ValueError, match="embed_guidance trains a range of guidance scales; got 3 alone, give both ends"
    ):
        embedding(name, guidance_scale=(3.0,))
    with pytest.raises(InputError, match="an adapter gives the pipeline's network no input for the guidance scale"):
        prepared(embedding(name), LoraSetting(2, 2.0))
