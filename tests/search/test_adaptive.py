"""The search for an adaptive grid: rewards in closed form, a policy gradient that finds the optimum, resumption."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_dit, tiny_stable_diffusion

from fewstep.samplers import ExplicitGrid, InputError, Plan, SpacingGrid, attach
from fewstep.samplers.step_policy import policy_logits
from fewstep.search.adaptive import (
    PolicyTraining,
    RewardRule,
    reinforce,
    render_scores,
    search_adaptive,
    train_network,
    train_table,
)

GRIDS = (SpacingGrid(steps=1), SpacingGrid(steps=2), SpacingGrid(steps=4))
QUICK = PolicyTraining(iterations=300, batch_size=32, lr=0.05, hidden=16)


def brightness(samples, conditions):
    return samples.double().flatten(1).mean(1)


def labelled(numbers):
    return {
        "class_labels": [number % 3 for number in numbers],
        "generator": [torch.Generator().manual_seed(number) for number in numbers],
        "guidance_scale": 1.0,
    }


def test_rewards_by_hand():
    scores = torch.tensor([[0.1, 0.5, 0.4, 0.9], [0.7, 0.7, 0.7, 0.2]], dtype=torch.float64)
    rewards = RewardRule(top=2, weight=2.0, penalty=0.3).rewards(scores, (5, 10, 15, 20))
    expected = [[-0.3, 0.5 + 1.0, -0.3, 0.0 + 1.8], [0.75 + 1.4, 0.5 + 1.4, 0.25 + 1.4, -0.3]]
    torch.testing.assert_close(rewards, torch.tensor(expected, dtype=torch.float64))


def test_the_gradient_is_that_of_the_expected_reward():
    """The mean over many draws against the closed form: d/dlogit_k of sum pi R is pi_k (R_k - sum pi R)."""
    rewards = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    start = torch.tensor([0.2, -0.4, 0.1])
    logits = start.clone().requires_grad_()
    steps = PolicyTraining(iterations=1, batch_size=200_000, lr=0.0)
    reinforce(rewards, lambda samples: logits.expand(len(samples), 3), [logits], steps)
    policy = start.double().softmax(0)
    expected = policy * (rewards[0] - (policy * rewards[0]).sum())
    torch.testing.assert_close(-logits.grad.double(), expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("seed", range(2))
def test_the_table_finds_the_best_choice_of_each_class(seed):
    draw = torch.Generator().manual_seed(seed)
    keys = [str(number % 4) for number in range(80)]
    best = torch.randint(5, (4,), generator=draw)
    rewards = 0.3 * torch.randn(80, 5, generator=draw, dtype=torch.float64)
    for number in range(80):
        rewards[number, best[number % 4]] += 1.0
    table = train_table(rewards, keys, PolicyTraining(iterations=200, lr=0.1, seed=seed))
    for key in "0123":
        mean = rewards[[index for index in range(80) if keys[index] == key]].mean(0)
        assert max(range(5), key=table[key].__getitem__) == int(mean.argmax())
        assert torch.tensor(table[key]).softmax(0).max() > 0.8
    again = train_table(rewards, keys, PolicyTraining(iterations=200, lr=0.1, seed=seed))
    assert again == table


def test_the_network_finds_the_best_choice_by_its_features():
    """The sign of one feature decides; the other is noise."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(200, 2, generator=draw) * torch.tensor([3.0, 1.0]) + 5
    positive = features[:, 0] > 5
    rewards = torch.where(positive[:, None], torch.tensor([[1.0, -1.0]]), torch.tensor([[-1.0, 1.0]])).double()
    tensors = train_network(rewards, features, QUICK)
    chosen = policy_logits(tensors, features).argmax(1)
    assert ((chosen == 0) == positive).double().mean() > 0.95
    again = train_network(rewards, features, QUICK)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    other = train_network(rewards, features, replace(QUICK, seed=1))
    assert (tensors["out.weight"] - other["out.weight"]).abs().max() > 1e-3


def test_a_search_by_class_returns_a_plan_that_runs(tmp_path):
    """A scorer that likes what few steps make of class 0, many of class 1, and does not mind for class 2."""
    pipe = tiny_dit()
    images = {}
    for grid in GRIDS:
        with attach(pipe, Plan(grid=grid)):
            images[grid.steps] = pipe(**labelled(range(12)), output_type="pt").images

    def scorer(samples, conditions):
        scores = []
        for sample, label in zip(samples, conditions["class_labels"], strict=True):
            steps = next(n for n, made in images.items() if any(torch.allclose(sample, i, atol=1e-5) for i in made))
            scores.append({0: -float(steps), 1: float(steps), 2: 0.0}[label])
        return torch.tensor(scores)

    plan = search_adaptive(
        pipe, Plan(name="quick"), GRIDS, scorer, labelled, 12, tmp_path, reward=RewardRule(top=1), training=QUICK
    )
    assert plan.name == "quick"
    assert plan.grid.choose([0, 1, 2], None) == [0, 2, 0]
    plan.save(tmp_path / "plan.json")
    with attach(pipe, Plan.load(tmp_path / "plan.json")) as handle:
        pipe(**labelled(range(3)))
    assert handle.stats.rows == 1 + 4 + 1


def test_a_search_by_embedding_writes_its_network_beside_the_plan(tmp_path):
    pipe = tiny_stable_diffusion()
    embeds = torch.randn(8, 4, 8, generator=torch.Generator().manual_seed(1))

    def call(numbers):
        return {
            "prompt_embeds": embeds[list(numbers)],
            "generator": [torch.Generator().manual_seed(number) for number in numbers],
            "guidance_scale": 1.0,
            "height": 16,
            "width": 16,
        }

    plan = search_adaptive(pipe, Plan(), GRIDS, brightness, call, 8, tmp_path, reward=RewardRule(2), training=QUICK)
    assert plan.grid.policy == "policy.safetensors"
    with attach(pipe, plan) as handle:  # before it is saved
        pipe(**call(range(2)))
    assert handle.stats.images == 2


def test_scores_are_kept_and_not_rendered_again(tmp_path):
    pipe = tiny_dit()
    made = []

    def counting(samples, conditions):
        made.append(len(samples))
        return brightness(samples, conditions)

    expected = render_scores(pipe, Plan(), GRIDS, counting, labelled, 5, tmp_path / "whole", batch_size=2)
    assert made == [2, 2, 1] * 3

    def stopping(samples, conditions):
        if len(made) == 4:
            raise KeyboardInterrupt
        return counting(samples, conditions)

    made.clear()
    told = []
    with pytest.raises(KeyboardInterrupt):
        render_scores(pipe, Plan(), GRIDS, stopping, labelled, 5, tmp_path / "half", batch_size=2)
    assert "_fewstep_attachment" not in vars(pipe)
    made.clear()
    resumed = render_scores(
        pipe, Plan(), GRIDS, counting, labelled, 5, tmp_path / "half", batch_size=2, progress=lambda *a: told.append(a)
    )
    assert sum(made) == 15 - 7
    assert told[-1] == (15, 15)
    torch.testing.assert_close(resumed, expected, rtol=0, atol=1e-6)
    made.clear()
    assert torch.equal(render_scores(pipe, Plan(), GRIDS, counting, labelled, 5, tmp_path / "half"), resumed)
    assert made == []
    assert all(math.isfinite(value) for value in resumed.flatten())


def test_what_cannot_be_searched(tmp_path):
    pipe = tiny_dit()
    render_scores(pipe, Plan(), GRIDS[:1], brightness, labelled, 2, tmp_path)
    with pytest.raises(InputError, match="is of another plan, grids, weights or n; give another folder"):
        render_scores(pipe, Plan(), (ExplicitGrid(timesteps=(5,)),), brightness, labelled, 2, tmp_path)
    with pytest.raises(InputError, match="the call for 2 samples asks for 1; ask for one each"):
        render_scores(pipe, Plan(), GRIDS, brightness, lambda numbers: labelled([0]), 2, tmp_path / "b")
    with pytest.raises(InputError, match="top is 3 and there are 2 choices; give at most as many"):
        RewardRule().rewards(torch.zeros(1, 2), (1, 2))
    with pytest.raises(InputError, match="a reward needs top of at least 1"):
        RewardRule(top=0)
    with pytest.raises(
        InputError, match="the calls have no 'prompt' for the policy to look at; they have class_labels"
    ):
        search_adaptive(pipe, Plan(), GRIDS, brightness, labelled, 2, tmp_path / "c", condition="prompt")
