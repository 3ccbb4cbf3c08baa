"""Calibration of caches: the choice of steps against brute force, and whole searches on tiny pipelines."""

import itertools
import math
import random

import pytest
import torch
from tiny import call_arguments, tiny_dit, tiny_stable_diffusion

from fewstep.samplers import BlockMask, InputError, Plan, SpacingGrid, attach
from fewstep.search import Budget, Judges, search_cache
from fewstep.search.cache import FRESH
from fewstep.search.cache_costs import Costs, cheapest_steps, measure_factors, measure_moves, worthwhile_steps

STEPS = 6


def random_costs(seed, gap=STEPS):
    draw = random.Random(seed)
    return Costs({"m": {step: {g: draw.random() for g in range(1, min(step, gap) + 1)} for step in range(1, STEPS)}})


def total(costs, chosen):
    ends = [*chosen, STEPS]
    return sum(costs.passed("m", last, until) for last, until in itertools.pairwise(ends))


def subsets():
    for size in range(STEPS):
        for rest in itertools.combinations(range(1, STEPS), size):
            yield (0, *rest)


@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_steps_are_those_of_brute_force(seed):
    costs = random_costs(seed)
    found = cheapest_steps(costs, "m", STEPS)
    for count in range(1, STEPS + 1):
        best = min((subset for subset in subsets() if len(subset) == count), key=lambda s: total(costs, s))
        assert found[count] == best


@pytest.mark.parametrize("price", [0.0, 0.3, 1.0, 10.0])
def test_the_worthwhile_steps_are_those_of_brute_force(price):
    costs = random_costs(7)
    best = min(subsets(), key=lambda s: total(costs, s) + price * len(s))
    assert worthwhile_steps(costs, "m", STEPS, price) == best


def test_gaps_that_were_not_measured_are_not_used():
    found = cheapest_steps(random_costs(0, gap=2), "m", STEPS)
    assert min(found) == 2  # one step cannot serve five others
    assert all(b - a <= 3 for chosen in found.values() for a, b in itertools.pairwise([*chosen, STEPS]))


def call_of(pipe):
    def call(numbers):
        arguments = call_arguments(pipe, batch=len(numbers))
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        return arguments | {"generator": generators}

    return call


def sample_of(pipe, count=2):
    def sample(plan):
        with attach(pipe, plan):
            return torch.as_tensor(pipe(**call_of(pipe)(range(count))).images)

    return sample


def test_moves_grow_with_the_gap_and_factors_give_back_what_was_measured():
    pipe = tiny_dit(layers=2)
    plan = Plan(grid=SpacingGrid(steps=STEPS))
    mask = BlockMask(rows=("1",) * STEPS, targets=("attention",))
    moved = measure_moves(plan, mask, lambda name: True, sample_of(pipe))
    assert sorted(moved) == [f"transformer.transformer_blocks.{index}.attn1" for index in range(2)]
    assert all(set(gaps) == set(range(1, step + 1)) for steps in moved.values() for step, gaps in steps.items())

    def single(step):
        rows = tuple("0" if index == step else "1" for index in range(STEPS))
        return BlockMask(rows=rows, targets=("attention",))

    factors = measure_factors(plan, single, moved, STEPS, sample_of(pipe))
    assert len(factors) == STEPS
    plain = sample_of(pipe)(plan)
    for step in range(1, STEPS):
        error = sample_of(pipe)(plan.model_copy(update={"caches": (single(step),)})) - plain
        change = sum(gaps[step][1] for gaps in moved.values())
        assert factors[step] * change == pytest.approx(float(error.double().square().mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("build", "cache"),
    [
        (tiny_dit, "step-rehash"),
        (tiny_dit, "block-mask"),
        (tiny_stable_diffusion, "unet-deep"),
        (tiny_stable_diffusion, "cross-attention-freeze"),
    ],
)
def test_a_search_keeps_the_budget_on_fresh_seeds_and_says_what_it_measured(build, cache):
    pipe = build(layers=2)
    plan = Plan(grid=SpacingGrid(steps=STEPS))
    loose = search_cache(pipe, plan, cache, Budget.parse("relative_error<=0.9"), call_of(pipe), 4, few=2, seeds=(7, 11))
    (part,) = loose.plan.caches
    assert part.type == cache
    evidence = {e.metric: e for e in loose.plan.evidence}
    assert evidence["relative_error"].value <= 0.9
    assert evidence["relative_error"].seeds == (7, 11)
    assert 0 < evidence["parameters_skipped"].value < 1
    assert loose.trials[-1].fresh
    assert loose.plan.tuned_for.steps == STEPS
    assert loose.trajectories <= 30
    with attach(pipe, loose.plan) as handle:
        pipe(**call_of(pipe)([FRESH, FRESH + 1]))
    assert sum(rows.skipped for rows in handle.stats.modules.values()) > 0


def test_a_tighter_budget_reuses_less():
    pipe = tiny_dit(layers=3)
    plan = Plan(grid=SpacingGrid(steps=STEPS))
    skipped = []
    for limit in (0.5, 0.06):
        budget = Budget("relative_error", limit)
        found = search_cache(pipe, plan, "step-rehash", budget, call_of(pipe), 4, few=2)
        skipped.append(found.trials[-1].skipped)
    assert skipped[0] > skipped[1] > 0


def test_refuses_when_nothing_within_the_budget_fires():
    pipe = tiny_dit(layers=2)
    plan = Plan(grid=SpacingGrid(steps=3))
    with pytest.raises(
        InputError, match=r"no setting of the gate cache within relative_error<=1e-12 reused anything in 3"
    ):
        search_cache(pipe, plan, "gate", Budget("relative_error", 1e-12), call_of(pipe), 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("psnr", "a budget is a metric, <= or >=, and a number, such as psnr>=30; got 'psnr'"),
        ("psnr<=30", "good values of psnr are >= the limit"),
        ("lpisp<=0.1", "did you mean 'lpips'"),
        ("lpips<=much", "the limit of a budget is a finite number; got 'much'"),
    ],
)
def test_words_of_a_bad_budget(text, words):
    with pytest.raises(InputError, match=words):
        Budget.parse(text)


def test_a_budget_reads_and_prints():
    budget = Budget.parse(" psnr >= 30 ")
    assert str(budget) == "psnr>=30"
    assert budget.allows(30.0)
    assert not budget.allows(29.9)
    assert not budget.allows(math.nan)


def test_a_metric_without_its_judge_is_refused():
    with pytest.raises(InputError, match="a budget of lpips needs the weights of its backbone, see --lpips_path"):
        Budget.parse("lpips<=0.1").check(Judges())
    with pytest.raises(InputError, match="a number of steps, at least 2; got a plan with None"):
        search_cache(tiny_dit(), Plan(), "gate", Budget("psnr", 30.0), lambda numbers: {}, 2)


def test_psnr_of_equal_images_is_that_of_the_smallest_difference():
    images = torch.rand(3, 1, 8, 8)
    assert Budget("psnr", 30.0).measure(images, images.clone(), Judges()).value > 60
