"""The training of routers: gradients against a loop by hand, and what is learned."""

from dataclasses import replace

import pytest
import torch
from mask_reference import forward
from tiny import call_arguments, tiny_dit, tiny_scheduler, tiny_sd3, tiny_stable_diffusion, tiny_wan

from fewstep.samplers import InputError, Plan, SpacingGrid, attach, fingerprint
from fewstep.samplers.block_mask import BlockMask
from fewstep.samplers.router import Router, read_router
from fewstep.search import router as module
from fewstep.search.router import (
    HARMONICA,
    LEARNING_TO_CACHE,
    ROUTER_FILE,
    STATE_FILE,
    RouterTraining,
    train_router,
)

PLAN = Plan(grid=SpacingGrid(steps=3))
RECIPES = {"harmonica": HARMONICA, "learning-to-cache": LEARNING_TO_CACHE}
TRAINING = RouterTraining(penalty=0.01, iterations=4, batch_size=2, lr=0.5, save_every=2)


def call_of(pipe):
    """From numbers of samples to arguments: each sample's seed and condition are those of its number."""
    everything = call_arguments(pipe, 16)

    def call(numbers):
        rows = [number % 16 for number in numbers]
        cut = {
            name: [value[row] for row in rows] if isinstance(value, list) else value[rows]
            for name, value in everything.items()
            if isinstance(value, list | torch.Tensor)
        }
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        return everything | cut | {"generator": generators}

    return call


class Blend:
    """Sublayers of the first step as they are, of the second blended with those of the first."""

    def __init__(self, logits):
        self.logits, self.kept, self.on = logits, {}, False

    def __call__(self, kind, block, compute):
        value = compute()
        if kind == "block":
            return value
        if not self.on:
            self.kept.setdefault((kind, block), value)
            return value
        p = self.logits[2 * block + (kind == "mlp")].sigmoid()
        return p * value + (1 - p) * self.kept[kind, block]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_gradient_is_that_of_a_loop_by_hand(recipe, tmp_path, monkeypatch):
    pipe, seen, learn = tiny_dit(layers=2), [], module._State.learn

    def watched(state, step, student, teacher):
        error = (student - teacher).square().mean()
        seen.append(torch.autograd.grad(error, state.logits[step], retain_graph=True)[0])
        learn(state, step, student, teacher)

    monkeypatch.setattr(module, "_LIMIT", 0.3)
    monkeypatch.setattr(module._State, "learn", watched)
    training = replace(TRAINING, iterations=1, recipe=RECIPES[recipe])
    train_router(pipe, Plan(grid=SpacingGrid(steps=2)), call_of(pipe), tmp_path, training)

    logits = torch.full((4,), 0.3, requires_grad=True)
    arguments, blend, scheduler = call_of(pipe)([0, 1]), Blend(logits), tiny_scheduler()
    scheduler.set_timesteps(2)
    x = torch.cat([torch.randn(1, 4, 4, 4, generator=generator) for generator in arguments["generator"]])
    labels = torch.tensor(arguments["class_labels"] + [1000] * 2)

    def predict(t):
        conditional, unconditional = forward(pipe.transformer, x.repeat(2, 1, 1, 1), t.expand(4), labels, blend).chunk(
            2
        )
        return unconditional + 4.0 * (conditional - unconditional)

    first, second = scheduler.timesteps
    with torch.no_grad():
        x = scheduler.step(predict(first), first, x).prev_sample
        teacher = predict(second)
    blend.on = True
    (expected,) = torch.autograd.grad((predict(second) - teacher).square().mean(), logits)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-6)
    assert expected.abs().min() > 1e-5


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("build", [tiny_dit, tiny_sd3, tiny_wan])
def test_closes_all_that_is_routed_when_computing_costs_much(build, recipe, tmp_path):
    pipe = build()
    before = fingerprint(pipe.transformer)
    training = replace(TRAINING, penalty=1e6, iterations=12, lr=1.0, recipe=RECIPES[recipe])
    plan = train_router(pipe, PLAN, call_of(pipe), tmp_path, training)
    rows = read_router(tmp_path / ROUTER_FILE)
    closed = [step for step in range(3) if bool((rows[step] < 0.1).all())]
    assert closed == ([1] if recipe == "learning-to-cache" else [1, 2])
    assert bool((rows[[step for step in range(3) if step not in closed]] == 1).all())
    assert plan.caches == (Router(file=ROUTER_FILE),)
    assert plan.tuned_for.steps == 3
    plan.save(tmp_path / "plan.json")
    with attach(pipe, Plan.load(tmp_path / "plan.json")) as handle:
        pipe(**call_of(pipe)([0, 1]))
    assert all(count.skipped == count.run / (3 / len(closed) - 1) for count in handle.stats.modules.values())
    assert fingerprint(pipe.transformer) == before == plan.tuned_for.fingerprint
    assert all(parameter.grad is None for parameter in pipe.transformer.parameters())
    assert torch.is_grad_enabled()


def test_closes_what_does_not_matter_and_keeps_what_does(tmp_path):
    """A sublayer that gives nothing at all may reuse at any price, one that gives something only at a high one."""
    pipe = tiny_dit(layers=2)
    for parameter in pipe.transformer.transformer_blocks[1].attn1.to_out[0].parameters():
        torch.nn.init.zeros_(parameter)
    training = replace(TRAINING, penalty=1e-7, iterations=15, lr=1.0, recipe=replace(HARMONICA, refresh=10))
    train_router(pipe, PLAN, call_of(pipe), tmp_path, training)
    closed = read_router(tmp_path / ROUTER_FILE)[1:] < 0.1
    assert closed.any(0).tolist() == closed.all(0).tolist() == [False, False, True, False]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stopped_training_goes_on_to_the_same_router(recipe, tmp_path):
    pipe = tiny_dit(layers=2)
    training = replace(TRAINING, recipe=replace(RECIPES[recipe], refresh=RECIPES[recipe].refresh and 3))
    told = []
    train_router(pipe, PLAN, call_of(pipe), tmp_path / "whole", training, lambda *news: told.append(news))
    assert [news[:2] for news in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    train_router(pipe, PLAN, call_of(pipe), tmp_path / "halves", replace(training, iterations=2))
    train_router(pipe, PLAN, call_of(pipe), tmp_path / "halves", training)
    whole, halves = (read_router(tmp_path / name / ROUTER_FILE) for name in ("whole", "halves"))
    assert torch.equal(whole, halves)
    assert (whole[1] < 0.9933).any()


@pytest.mark.filterwarnings("ignore:the block-mask cache computes all")
def test_the_weight_of_a_step_is_the_error_of_the_samples_when_only_it_reuses(tmp_path):
    pipe = tiny_wan(layers=2)
    call = call_of(pipe)
    state = module._State(replace(TRAINING, penalty=0.0), 3, 6, "")
    weights = module._image_errors(pipe, PLAN, call, state)

    def sampled(rows):
        mask = BlockMask(rows=tuple(rows), targets=("attention", "cross-attention", "mlp"))
        with attach(pipe, Plan(grid=PLAN.grid, caches=mask)):
            return pipe(**call([0, 1]))[0]

    errors = [float((sampled(rows) - sampled("111")).square().mean()) for rows in ("111", "101", "110")]
    expected = torch.tensor(errors) / sum(errors) * 2
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


def test_refuses_what_cannot_be_trained(tmp_path):
    pipe = tiny_dit(layers=1)
    call = call_of(pipe)
    with pytest.raises(InputError, match="trained on a grid of at least 2 steps; the plan has no grid"):
        train_router(pipe, Plan(), call, tmp_path, TRAINING)
    with pytest.raises(InputError, match="UNet2DConditionModel is a U-Net"):
        train_router(tiny_stable_diffusion(), PLAN, call, tmp_path, TRAINING)
    with pytest.raises(InputError, match="iterations, batch_size and save_every of at least 1"):
        replace(TRAINING, batch_size=0)

    def unseeded(numbers):
        return call(numbers) | {"generator": torch.Generator().manual_seed(0)}

    with pytest.raises(InputError, match="samples of the same number start from different noise"):
        train_router(pipe, PLAN, unseeded, tmp_path, TRAINING)
    assert torch.is_grad_enabled()
    with pytest.raises(InputError, match="the call samples 6 rows for 4 numbers; give one sample for each"):
        train_router(pipe, PLAN, lambda numbers: call([*numbers, 9, 9][:3]), tmp_path, TRAINING)
    train_router(pipe, PLAN, call, tmp_path, TRAINING)
    with pytest.raises(InputError, match=f"{STATE_FILE} is of another pipeline, plan or training; give another folder"):
        train_router(pipe, PLAN, call, tmp_path, replace(TRAINING, penalty=0.5))
