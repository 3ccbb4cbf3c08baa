"""What holds for every distillation method: its losses reach their roles alone, it resumes, and its plan runs."""

from __future__ import annotations

import pytest
import torch
from method_cases import CASES, TinySource, method_of, team_of
from tiny import tiny_dit
from toy_method import fresh_accelerator, options

import fewstep.distill.methods  # noqa: F401
from fewstep.distill.loop import Loop
from fewstep.distill.method import METHODS, Moment
from fewstep.samplers import Process, attach

METHOD = pytest.mark.parametrize("name", METHODS.names())
LORA = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


def test_every_method_has_a_case():
    assert sorted(CASES) == METHODS.names()


def moment_of(updates, turn=0, rows=3):
    return Moment(step=turn, turn=turn, stage=0, stage_step=turn, updates=updates, seed=5, positions=range(rows))


@METHOD
@LORA
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_each_loss_reaches_its_role_and_no_other(name, lora, checkpointing):
    method = method_of(name)
    team = team_of(method, lora)
    if checkpointing:
        team.roles.enable_gradient_checkpointing()
    everything = {role: list(team.trainable(role).values()) for role in team.roles.trained}
    reached = set()
    for updates in dict.fromkeys(turn for stage in method.turns().stages for turn in stage.cycle):
        moment = moment_of(updates)
        for loss in method.losses(TinySource().batch(0, moment.positions), team, moment):
            assert loss.value.shape == (3,)
            assert loss.value.dtype == torch.float32
            assert loss.value.requires_grad
            assert loss.value.isfinite().all()
            assert all(part.shape == (3,) for part in loss.parts.values())
            parameters = [p for each in everything.values() for p in each]
            gradients = torch.autograd.grad(loss.value.mean(), parameters, allow_unused=True)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            touched = {
                role
                for role, each in everything.items()
                if any(p.grad is not None and p.grad.abs().max() > 0 for p in each)
            }
            assert touched <= {loss.role}, loss.term
            reached |= touched
    assert reached == set(method.turns().roles)


def run(name, folder, steps, lora=True, **changes):
    method = method_of(name)
    team = team_of(method, lora)
    settings = options(folder, steps, learning_rate=1e-3, train_batch_size=3, **changes)
    Loop(method, team, TinySource(), settings, fresh_accelerator(settings)).run()
    return team


@METHOD
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    whole = run(name, tmp_path / "whole", 4).state()
    run(name, tmp_path / "parts", 2)
    parts = run(name, tmp_path / "parts", 4, resume_from_checkpoint="latest").state()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    begun = team_of(method_of(name), True).state()
    assert any(not torch.equal(begun[key], whole[key]) for key in whole if key.startswith("student/"))


@METHOD
def test_its_plan_samples_in_the_steps_it_says(name):
    pipe = tiny_dit()
    steps = CASES[name].steps
    plan = method_of(name).plan(Process.from_scheduler(pipe.scheduler), steps)
    with attach(pipe, plan) as fast:
        pipe(class_labels=[1], output_type="np", generator=torch.Generator().manual_seed(0))
    assert len(fast.stats.steps) == steps
