"""Calibration of caches: the choice of steps against brute force, and whole searches on tiny pipelines."""

import itertools
import math

import pytest
import torch
from mask_reference import newton
from tiny import call_arguments, tiny_dit, tiny_stable_diffusion

from fewstep.samplers import BlockMask, InputError, Plan, SpacingGrid, StepRehash, UNetDeep, attach
from fewstep.samplers.feature_changes import measure_changes
from fewstep.search import LADDERS, Budget, Judges, cache_costs, search_cache
from fewstep.search.cache import FRESH
from fewstep.search.cache_costs import Costs, measure_factors, measure_products
from fewstep.search.rungs import Rung, equal_change_steps, even_steps, ladder_of, whole_steps
from fewstep.search.step_choice import (
    APART,
    LONGEST,
    cheapest_steps,
    longest_run,
    predicted,
    refined_steps,
    worthwhile_steps,
)

STEPS = 6


class Walk:
    """A feature that wanders from step to step, and what it costs to forecast it, said once more."""

    def __init__(self, seed, steps=STEPS):
        draw = torch.Generator().manual_seed(seed)
        self.values = torch.randn(steps, 5, generator=draw, dtype=torch.float64).cumsum(0).cumsum(0)
        self.factors = tuple(torch.rand(steps, generator=draw).tolist())
        self.costs = Costs([self.values @ self.values.T], self.factors)

    def errors(self, chosen, order):
        kept = []
        for step, value in enumerate(self.values):
            if step in chosen:
                kept = [(step, value), *kept][: order + 1]
            else:
                yield math.sqrt(self.factors[step]) * (value - newton(kept, step))

    def apart(self, chosen, order):
        return sum(float(error.square().sum()) for error in self.errors(chosen, order))

    def together(self, chosen, order):
        errors = list(self.errors(chosen, order))
        return float(sum(errors).square().sum()) if errors else 0.0


def subsets(steps=STEPS):
    for size in range(steps):
        for rest in itertools.combinations(range(1, steps), size):
            yield (0, *rest)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_costs_are_those_of_the_forecasts(seed, order):
    walk = Walk(seed)
    for chosen in subsets():
        assert walk.costs.apart(chosen, order) == pytest.approx(walk.apart(chosen, order), rel=1e-9, abs=1e-9)
        assert walk.costs.together(chosen, order) == pytest.approx(walk.together(chosen, order), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_cheapest_steps_are_those_of_brute_force(seed, order):
    walk = Walk(seed, steps=8)
    found = cheapest_steps(walk.costs, order)
    assert sorted(found) == list(range(1, 9))
    for count, chosen in found.items():
        least = min(walk.apart(other, order) for other in subsets(8) if len(other) == count)
        assert len(chosen) == count
        assert walk.apart(chosen, order) == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("price", [0.0, 0.3, 3.0, 1000.0])
def test_the_worthwhile_steps_are_those_of_brute_force(price, order):
    walk = Walk(7, steps=8)
    best = min(subsets(8), key=lambda chosen: walk.apart(chosen, order) + price * len(chosen))
    assert worthwhile_steps(walk.costs, order, price) == best


@pytest.mark.parametrize("order", [0, 1, 2])
def test_runs_of_forecasts_are_no_longer_than_allowed(order):
    walk = Walk(0, steps=8)
    found = cheapest_steps(walk.costs, order, longest=2)
    assert min(found) == 3  # two steps that compute and two runs of two are six
    for count, chosen in found.items():
        assert longest_run(chosen, 8) <= 2
        allowed = [other for other in subsets(8) if len(other) == count and longest_run(other, 8) <= 2]
        assert chosen == min(allowed, key=lambda other: walk.apart(other, order))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_no_single_move_betters_refined_steps(order):
    walk = Walk(3, steps=9)

    def expected(chosen):
        return walk.together(chosen, order) + APART * walk.apart(chosen, order)

    start = even_steps(9, 4)
    found = refined_steps(walk.costs, start, order)
    assert predicted(walk.costs, found, order) == pytest.approx(expected(found))
    assert expected(found) <= expected(start)
    for gone, to in itertools.product(found[1:], set(range(1, 9)) - set(found)):
        assert expected(sorted({*found, to} - {gone})) >= expected(found)


def test_a_branch_that_did_not_run_is_forecast_from_where_it_did():
    walk = Walk(1)
    late = walk.costs.products[0].clone()
    late[:2] = late[:, :2] = math.nan
    costs = Costs([late], walk.factors)
    assert costs.of(1, (0,)) == 0.0
    assert costs.of(2, (1, 0)) == 0.0  # with nothing to go on from it computes
    assert costs.of(4, (3, 1)) == pytest.approx(walk.costs.of(4, (3,)))
    both = Costs([late, *walk.costs.products], walk.factors)
    assert both.of(4, (3, 1)) == pytest.approx(costs.of(4, (3,)) + walk.costs.of(4, (3, 1)))
    assert both.together((0, 3), 1) == pytest.approx(costs.together((0, 3), 1) + walk.costs.together((0, 3), 1))


def test_steps_that_are_tried_are_few_and_of_two_orders():
    tried = whole_steps(Walk(2, steps=24).costs)
    assert len(tried) <= 40
    assert len(set(tried)) == len(tried)
    counts = [len(chosen) for chosen, _ in tried]
    assert (min(counts), max(counts)) == (3, 23)
    for chosen, order in tried:
        assert order in (0, 1, 2)
        assert chosen[0] == 0
        assert longest_run(chosen, 24) <= LONGEST


def test_a_ladder_has_what_nothing_else_betters():
    parts = [UNetDeep(interval=every) for every in range(1, 7)]
    tried = [(0.5, 0.2), (0.9, 0.1), (0.3, 0.4), (0.5, 0.3), (0.4, 0.4), (0.2, 0.5)]
    rungs = [Rung(part, share, error) for part, (share, error) in zip(parts, tried, strict=True)]
    assert ladder_of(rungs) == (parts[1], parts[0], parts[2], parts[5])


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


def attentions(steps, skip=()):
    return BlockMask(rows=tuple("10"[step in skip] for step in range(steps)), targets=("attention",))


def test_products_are_those_of_the_features_and_factors_give_back_what_was_measured():
    pipe = tiny_dit(layers=2)
    plan = Plan(grid=SpacingGrid(steps=STEPS))
    seen = [[], []]
    hooks = [
        block.attn1.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output.double()))
        for block, kept in zip(pipe.transformer.transformer_blocks, seen, strict=True)
    ]
    products = measure_products(plan, attentions(STEPS), lambda name: True, STEPS, sample_of(pipe))
    for hook in hooks:
        hook.remove()
    assert list(products) == [f"transformer.transformer_blocks.{index}.attn1" for index in range(2)]
    for (table,), outputs in zip(products.values(), seen, strict=True):
        flat = torch.stack(outputs).flatten(1)
        torch.testing.assert_close(table, flat @ flat.T / len(outputs[0]), rtol=1e-6, atol=1e-9)

    plain, factors = measure_factors(plan, lambda step: attentions(STEPS, {step}), products, STEPS, sample_of(pipe))
    torch.testing.assert_close(plain, sample_of(pipe)(plan), rtol=0, atol=0)
    both = Costs([table for tables in products.values() for table in tables], factors)
    for step in range(1, STEPS):
        error = sample_of(pipe)(plan.model_copy(update={"caches": (attentions(STEPS, {step}),)})) - plain
        assert both.of(step, (step - 1,)) == pytest.approx(float(error.double().square().mean()), rel=1e-6)


def test_products_of_large_features_are_estimated_from_some_values(monkeypatch):
    pipe = tiny_dit(layers=1)
    plan = Plan(grid=SpacingGrid(steps=3))
    (all_of_it,) = measure_products(plan, attentions(3), lambda name: True, 3, sample_of(pipe)).values()
    monkeypatch.setattr(cache_costs, "LOOKED_AT", 32)
    (some,) = measure_products(plan, attentions(3), lambda name: True, 3, sample_of(pipe)).values()
    assert not torch.equal(some[0], all_of_it[0])
    torch.testing.assert_close(some[0].diagonal(), all_of_it[0].diagonal(), rtol=0.4, atol=0)


@pytest.mark.parametrize("cache", ["block-mask", "step-rehash", "unet-deep"])
def test_rungs_reuse_more_and_more(cache):
    """A ladder that knows forecasts goes from the mildest setting to the boldest one, and both are run."""
    pipe = tiny_stable_diffusion(layers=2) if cache == "unet-deep" else tiny_dit(layers=2)
    plan, runs = Plan(grid=SpacingGrid(steps=STEPS)), []
    sample = sample_of(pipe)
    ladder = LADDERS[cache](pipe, plan, STEPS, lambda plan: runs.append(plan) or sample(plan))
    plain = sample(plan)
    errors = [
        float((sample(plan.model_copy(update={"caches": (part,)})) - plain).double().square().mean()) for part in ladder
    ]
    assert errors == sorted(errors)
    assert len(ladder) >= 3
    assert len(runs) <= 3 + (STEPS - 1) * 6 + 8


@pytest.mark.parametrize("cache", ["block-mask", "step-rehash", "unet-deep"])
def test_a_ladder_is_as_good_as_steps_of_equal_change(cache):
    """At each number of steps and each order, on the samples that it was built on."""
    pipe = tiny_stable_diffusion(layers=2) if cache == "unet-deep" else tiny_dit(layers=2)
    plan, sample = Plan(grid=SpacingGrid(steps=STEPS)), sample_of(pipe)
    plain = sample(plan)

    def error(part):
        samples = sample(plan.model_copy(update={"caches": (part,)}))
        return float((samples - plain).double().square().mean())

    def by_hand(chosen, order):
        if cache == "unet-deep":
            return UNetDeep(steps=chosen, order=order)
        if cache == "step-rehash":
            return StepRehash(changes=[step in chosen for step in range(1, STEPS)], threshold=0.5, order=order)
        targets = ("attention", "cross-attention", "mlp")
        return BlockMask(rows=["01"[step in chosen] for step in range(STEPS)], targets=targets, order=order)

    def share(part):
        table = part.steps if cache == "unet-deep" else [each for row in part.table() for each in row]
        return len(table) / STEPS if cache == "unet-deep" else sum(table) / len(table)

    changes = measure_changes(pipe, plan, call_of(pipe)(range(2)))
    ladder = [(share(part), error(part)) for part in LADDERS[cache](pipe, plan, STEPS, sample)]
    for count in range(1, STEPS):
        table = StepRehash(changes=changes, budget=count).table()
        chosen = tuple(step for step, (computes,) in enumerate(table) if computes)
        assert equal_change_steps(changes, count) == chosen
        for order in (0, 1, 2):
            assert min(got for work, got in ladder if work <= count / STEPS) <= error(by_hand(chosen, order))


def test_steps_of_equal_change_are_tried_at_every_order():
    costs, changes = Walk(2, steps=12).costs, tuple(range(1, 12))
    tried = whole_steps(costs, changes)
    assert set(whole_steps(costs)) < set(tried)
    for count in range(3, 12):
        assert {(equal_change_steps(changes, count), order) for order in (0, 1, 2)} <= set(tried)
    assert equal_change_steps((1.0,) * 11, 6) == (0, 2, 4, 6, 8, 10)


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
