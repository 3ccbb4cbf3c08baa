"""AutoDiffusion's evolutionary search: its candidates, its two stages, and that it finds what it looks for."""

import random
from dataclasses import replace

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from tiny import tiny_unet

from fewstep.samplers import DiffusersSolver, InputError, Plan, SpacingGrid
from fewstep.search.axes.grid_index import GridIndexAxis
from fewstep.search.axes.layers import LayersAxis
from fewstep.search.evolution import Breed, Evolution, EvolutionSampler, skip_range
from fewstep.search.genes import Candidate, Genes, uniform_times
from fewstep.search.space import Space, plan_key

STEPS, TRAIN = 5, 1000
MODULES = [f"blocks.{k}.{part}" for k in range(4) for part in ("attn", "mlp")]
SMALL = Evolution(population=10, epochs=9, parents=4, mutants=5, crossovers=3)

TIMES = {f"grid-index.{k}": IntDistribution(0, TRAIN - 1) for k in range(STEPS)}
SKIPS = {f"layers.{k}.{module}": CategoricalDistribution((0, 1)) for k in range(STEPS) for module in MODULES}
OTHERS = {
    "guidance.scale": FloatDistribution(1.0, 4.0),
    "solver.order": CategoricalDistribution(("one", "two", "three")),
}


def ask(study):
    return study.ask(TIMES | SKIPS | OTHERS)


def breed(seed=0, space=TIMES | SKIPS | OTHERS, setting=SMALL):
    draw = random.Random(seed)

    def anew(name):
        distribution = space[name]
        if isinstance(distribution, FloatDistribution):
            return draw.uniform(distribution.low, distribution.high)
        return draw.choice(distribution.choices)

    return Breed(Genes.of(space, STEPS), setting, draw, anew)


def total(candidate):
    return sum(map(len, candidate.skipped))


def canonical(candidate):
    return list(candidate.times) == sorted(set(candidate.times), reverse=True) and len(candidate.times) == STEPS


def loss(params, hidden):
    return sum(abs(params[f"grid-index.{k}"] - time) for k, time in enumerate(hidden))


def run(seed, trials, evaluate, fresh=True, setting=SMALL, study=None, space=TIMES | SKIPS | OTHERS):
    """A study whose sampler is made anew for each trial, as a search does."""
    study = study or optuna.create_study(sampler=EvolutionSampler(STEPS, seed, setting))
    while len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))) < trials:
        if fresh:
            study.sampler = EvolutionSampler(STEPS, seed, setting)
        trial = study.ask(space)
        state, value = evaluate(trial)
        study.tell(trial, value, state=state)
    return study


def complete(trial, hidden=(900, 600, 350, 150, 40)):
    return TrialState.COMPLETE, loss(trial.params, hidden)


def params(study):
    return [trial.params for trial in study.trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]


SHARES = [(0.0, 0.0), (0.0, 0.02), (0.0, 0.1), (0.05, 0.1), (0.5, 0.6)]


@pytest.mark.parametrize("share", SHARES)
def test_candidates_are_sequences_of_distinct_times_with_a_share_of_skipped_layers_in_range(share):
    one = breed()
    least, most = share[0] * STEPS * len(MODULES), share[1] * STEPS * len(MODULES)
    candidates = [one.random(share) for _ in range(200)]
    for _ in range(1000):
        parents = one.draw.sample(candidates, 2)
        candidates.append(one.draw.choice([one.mutant(parents[0], 0.25, share), one.crossover(*parents, share)]))
    assert all(canonical(candidate) for candidate in candidates)
    counts = [total(candidate) for candidate in candidates]
    assert least <= min(counts)
    assert max(counts) <= most
    assert max(counts) == int(most + 1e-9)


def test_parameters_spell_a_candidate_and_back():
    one = breed()
    for _ in range(100):
        candidate = one.random((0.1, 0.4))
        spelt = one.genes.write(candidate)
        assert spelt.keys() == (TIMES | SKIPS | OTHERS).keys()
        assert one.genes.read(spelt) == candidate
        assert sum(spelt[name] for name in SKIPS) == total(candidate)


def test_what_a_step_skips_stays_with_its_time_when_a_candidate_is_sorted():
    one = breed()
    skipped = [frozenset(MODULES[:k]) for k in range(STEPS)]
    found = one.genes.ordered((5, 900, 30, 700, 100), skipped, ())
    assert found.times == (900, 700, 100, 30, 5)
    assert found.skipped == tuple(skipped[k] for k in (1, 3, 4, 2, 0))


def test_a_mutant_changes_every_gene_with_the_probability():
    one, share = breed(), (0.4, 0.6)
    parent = one.random(share)
    certain = one.mutant(parent, 1.0, share)
    assert not {*certain.times} & {*parent.times}
    assert all(ours != theirs for ours, theirs in zip(certain.others, parent.others, strict=True))
    mutants = [one.mutant(parent, 0.25, (0.0, 1.0)) for _ in range(1000)]
    kept = [len({*mutant.times} & {*parent.times}) / STEPS for mutant in mutants]
    assert sum(kept) / 1000 == pytest.approx(0.75, abs=0.02)
    scales = [mutant.others[0] == parent.others[0] for mutant in mutants]
    assert sum(scales) / 1000 == pytest.approx(0.75, abs=0.05)


def test_a_skipped_layer_mutates_to_another_layer_of_its_step():
    one = breed(space=TIMES | SKIPS)
    parent = Candidate(tuple(range(900, 400, -100)), (frozenset(MODULES[:2]),) * STEPS, ())
    moved = [
        one.mutant(replace(parent, times=()), 0.25, (0.0, 1.0)) for one in [breed(space=SKIPS)] for _ in range(1000)
    ]
    assert all(len(skips) == 2 for mutant in moved for skips in mutant.skipped)
    stayed = [len(skips & parent.skipped[0]) / 2 for mutant in moved for skips in mutant.skipped]
    assert sum(stayed) / len(stayed) == pytest.approx(0.75, abs=0.02)
    assert {module for mutant in moved for skips in mutant.skipped for module in skips} == {*MODULES}
    whole = replace(parent, skipped=(frozenset(),) * STEPS)
    begun = [bool(skips) for _ in range(400) for skips in one.mutant(whole, 0.25, (1.0, 1.0 + 1e-9)).skipped]
    assert any(begun)


def test_a_crossover_has_the_genes_of_both_parents_and_as_many_steps():
    one, share = breed(), (0.0, 1.0)
    for _ in range(300):
        first, second = one.random((0.2, 0.4)), one.random((0.2, 0.4))
        children = [one.crossover(first, second, share) for _ in range(8)]
        of = dict(zip(first.times + second.times, first.skipped + second.skipped, strict=True))
        for child in children:
            assert canonical(child)
            assert {*child.times} <= {*of}
            assert {*child.others} <= {*first.others, *second.others}
            if len(of) == 2 * STEPS:
                assert child.skipped == tuple(of[time] for time in child.times)
        assert any({*child.times} - {*first.times} and {*child.times} - {*second.times} for child in children)


def test_a_crossover_of_parents_that_share_times_loses_no_step():
    one = breed(space=TIMES)
    first, second = Candidate((9, 8, 7, 6, 5), (), ()), Candidate((8, 7, 6, 5, 4), (), ())
    children = {one.crossover(first, second, (0.0, 0.0)) for _ in range(300)}
    assert all(canonical(child) and {*child.times} <= {*range(4, 10)} for child in children)
    assert len(children) > 2


@pytest.mark.parametrize(
    ("times", "steps", "leading", "trailing"),
    [
        (range(1000), 4, (750, 500, 250, 0), (999, 749, 499, 249)),
        (range(1, 1001), 5, (801, 601, 401, 201, 1), (1000, 800, 600, 400, 200)),
        (range(3), 3, (2, 1, 0), None),
    ],
)
def test_the_uniform_sequences_are_those_of_diffusers(times, steps, leading, trailing):
    assert uniform_times(times, steps) == [leading] + ([trailing] if trailing else [])


def test_uniform_sequences_are_the_ones_that_ddim_has():
    from diffusers import DDIMScheduler

    for steps in range(1, 21):
        ours = uniform_times(range(1000), steps)
        for spacing, sequence in zip(("leading", "trailing"), ours, strict=True):
            theirs = DDIMScheduler(timestep_spacing=spacing)
            theirs.set_timesteps(steps)
            assert tuple(theirs.timesteps.tolist()) == sequence


def test_the_first_epoch_is_uniform_sequences_then_random_ones_then_mutants_of_the_uniform_ones():
    study = run(3, 50, complete, setting=Evolution(first_mutation=0.1))
    sequences = [tuple(found[f"grid-index.{k}"] for k in range(STEPS)) for found in params(study)]
    leading, trailing = uniform_times(range(TRAIN), STEPS)
    assert sequences[:2] == [leading, trailing]
    shared = [max(len({*one} & {*leading}), len({*one} & {*trailing})) for one in sequences]
    assert max(shared[2:26]) <= 2
    assert min(shared[26:]) >= 2
    assert sum(shared[26:]) / 24 > 3.5
    assert not any(found[name] for found in params(study) for name in SKIPS)


def test_the_second_stage_begins_when_the_best_candidate_stays_or_after_six_epochs():
    setting = Evolution(min_skipped=0.03)
    largest = [skip_range([*range(n)], setting)[1] for n in range(13)]
    assert largest == pytest.approx([0, 0, 0, 0, 0, 0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1])
    least = [skip_range([*range(n)], setting)[0] for n in range(13)]
    assert least == pytest.approx([0] * 7 + [0.03] * 6)
    assert skip_range([7, 7], setting) == pytest.approx((0, 0.02))
    assert skip_range([7, 8, 8, 9], setting) == pytest.approx((0, 0.04))
    assert skip_range([1, 1, 1, 1, 1, 1, 1], replace(setting, min_skipped=0.1, max_skipped=0.1))[0] == 0.1


def test_layers_are_skipped_from_the_second_stage_on_within_its_share():
    falling = iter(range(1000, 0, -1))
    study = run(0, 100, lambda trial: (TrialState.COMPLETE, float(next(falling))))
    counts = [sum(found[name] for name in SKIPS) for found in params(study)]
    layers = STEPS * len(MODULES)
    epochs = [counts[first : first + 10] for first in range(0, 100, 10)]
    assert not any(map(any, epochs[:6]))
    for epoch in (6, 7, 8, 9):
        assert max(epochs[epoch]) <= 0.02 * (epoch - 5) * layers + 1e-9
    assert any(epochs[8])
    steady = run(0, 60, lambda trial: (TrialState.COMPLETE, 1.0))
    counts = [sum(found[name] for name in SKIPS) for found in params(steady)]
    assert not any(counts[:20])
    assert any(counts[30:])


def test_no_candidate_comes_twice():
    study = run(1, 100, complete)
    found = [tuple(sorted(one.items())) for one in params(study)]
    assert len({*found}) == 100


def test_when_every_candidate_was_evaluated_they_come_again():
    sampler = EvolutionSampler(2, 0, SMALL)
    study = optuna.create_study(sampler=sampler)
    few = {f"grid-index.{k}": IntDistribution(0, 2) for k in range(2)}
    for value in range(12):
        study.tell(study.ask(few), value)
    assert len({tuple(sorted(trial.params.values())) for trial in study.trials}) == 3


def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been():
    whole = run(4, 60, complete, fresh=False)
    broken = None
    for end in (1, 2, 13, 30, 47, 60):
        broken = run(4, end, complete, study=broken)
        broken.tell(ask(broken), state=TrialState.FAIL)
    assert params(broken) == params(whole)
    assert params(run(5, 60, complete)) != params(whole)


def test_pruned_trials_count_and_are_the_worst():
    def prune_good(trial):
        if trial.params["grid-index.0"] < 700:
            trial.report(0.0, 256)
            return TrialState.PRUNED, None
        return TrialState.COMPLETE, float(trial.params["grid-index.0"])

    study = run(0, 60, prune_good)
    firsts = [found["grid-index.0"] for found in params(study)]
    bred = [first for n, first in enumerate(firsts) if n >= 20 and n % 10 < 8]
    assert sum(first >= 700 for first in bred) > 0.8 * len(bred)


def test_a_direction_decides_what_is_better():
    study = optuna.create_study(direction="maximize", sampler=EvolutionSampler(STEPS, 0, SMALL))
    run(0, 40, lambda trial: (TrialState.COMPLETE, -complete(trial)[1]), study=study, space=TIMES)
    assert params(study) == params(run(0, 40, complete, space=TIMES))


def test_candidates_that_break_a_constraint_are_no_parents():
    def broken_by(trial):
        return (700.0 - trial.params["grid-index.0"],)

    study = optuna.create_study(sampler=EvolutionSampler(STEPS, 0, SMALL, constraints=broken_by))
    run(0, 60, lambda trial: (TrialState.COMPLETE, trial.params["grid-index.0"]), False, study=study, space=TIMES)
    bred = [found["grid-index.0"] for n, found in enumerate(params(study)) if n >= 20 and n % 10 < 8]
    assert sum(first >= 700 for first in bred) > 0.7 * len(bred)


def test_it_finds_a_hidden_sequence_better_than_chance():
    hidden = (961, 612, 377, 151, 33)

    def best(sampler):
        study = optuna.create_study(sampler=sampler)
        for _ in range(200):
            trial = study.ask(TIMES)
            times = sorted(trial.params.values(), reverse=True)
            study.tell(trial, sum(abs(one - two) for one, two in zip(times, hidden, strict=True)))
        return study.best_value

    evolved = [best(EvolutionSampler(STEPS, seed, SMALL)) for seed in range(3)]
    chance = [best(optuna.samplers.RandomSampler(seed=seed)) for seed in range(3)]
    assert sum(evolved) < 0.7 * sum(chance)


def test_it_finds_layers_that_do_not_matter():
    idle = {name for name in SKIPS if "mlp" in name}

    def skips(trial):
        on = {name for name in SKIPS if trial.params[name]}
        return TrialState.COMPLETE, float(len(on - idle) - len(on & idle))

    best = run(0, 150, skips, setting=replace(SMALL, max_skipped=0.2), space=SKIPS).best_trial
    on = {name for name in SKIPS if best.params[name]}
    assert len(on) >= 6
    assert on <= idle


def test_trials_that_run_at_the_same_time_are_different_ones():
    study = run(0, 15, complete)
    running = [ask(study) for _ in range(30)]
    assert len({tuple(sorted(trial.params.items())) for trial in running}) == 30


def test_starts_take_places_of_the_first_epoch_and_the_uniform_sequences_still_come():
    study = optuna.create_study(sampler=EvolutionSampler(STEPS, 0, SMALL))
    start = {f"grid-index.{k}": time for k, time in enumerate((3, 500, 20, 900, 100))}
    study.enqueue_trial(start)
    run(0, 40, complete, study=study, space=TIMES)
    sequences = [tuple(found.values()) for found in params(study)]
    assert sequences[0] == (3, 500, 20, 900, 100)
    assert sequences[1:3] == uniform_times(range(TRAIN), STEPS)
    assert (900, 500, 100, 20, 3) not in sequences


def test_it_searches_the_space_of_steps_and_layers_without_a_plan_that_comes_twice():
    base = Plan(solver=DiffusersSolver(scheduler="DDIMScheduler"), grid=SpacingGrid(steps=4))
    pipe = tiny_unet()
    space = Space(base, (GridIndexAxis.of(pipe, base), LayersAxis.of(pipe, base)))
    study = optuna.create_study(sampler=EvolutionSampler(4, 0, SMALL))
    plans = []
    for _ in range(40):
        trial = study.ask()
        plan = space.suggest(trial)
        assert plan.grid.timesteps == tuple(trial.params[f"grid-index.{k}"] for k in range(4))
        study.tell(trial, 1.0)
        plans.append(plan)
    assert len({plan_key(plan) for plan in plans}) == 40
    assert not any(plan.caches for plan in plans[:20])
    assert any(plan.caches for plan in plans[20:])
    for plan, trial in zip(plans, study.trials, strict=True):
        assert sum(row.count("0") for cache in plan.caches for row in cache.rows) == sum(
            value for name, value in trial.params.items() if name.startswith("layers.")
        )


def test_settings_that_make_no_sense_are_refused():
    assert Evolution().trials == 750
    for words, options in {
        "population and parents of at least 2": {"parents": 1},
        "at most the population together": {"mutants": 40},
        "a probability above 0, up to 1": {"mutation": 0.0},
        "0 <= min_skipped <= max_skipped <= 1": {"min_skipped": 0.2},
    }.items():
        with pytest.raises(InputError, match=words):
            Evolution(**options)
    with pytest.raises(InputError, match="at least 1 step; got 0"):
        EvolutionSampler(0, 0)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (
            {"grid-index.0": IntDistribution(0, 9)},
            "chooses 2 times out of the same ones; the parameters are grid-index.0",
        ),
        ({f"grid-index.{k}": IntDistribution(0, 8 + k) for k in range(2)}, "out of the same ones"),
        ({f"grid-index.{k}": IntDistribution(3, 3) for k in range(2)}, "2 distinct times cannot be chosen from 1"),
        ({f"grid-index.{k}": FloatDistribution(0, 1) for k in range(2)}, "train time's parameter is an integer"),
        ({"layers.0.mlp": IntDistribution(0, 2)}, "two values, such as 0 and 1"),
        ({"layers.2.mlp": IntDistribution(0, 1)}, "layers.2.mlp is a parameter of step 2; evolution has 2"),
    ],
)
def test_parameters_that_spell_no_candidate_are_refused(space, words):
    with pytest.raises(InputError, match=words):
        Genes.of(space, 2)


def test_more_objectives_are_refused():
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=EvolutionSampler(STEPS, 0))
    with pytest.raises(InputError, match="one objective and the study has 2"):
        ask(study)
