"""The search as a whole, on a teacher whose network is exact and whose small spaces can be searched by brute force."""

from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from mixture import mixture_call, mixture_pipeline
from toy_judges import toy_judges

from fewstep.eval import paired_difference
from fewstep.samplers import DiffusersSolver, ExplicitGrid, InputError, Plan, denoisers
from fewstep.search import Found, Limit, Objective, SearchSetting, Space, search, write_search_report
from fewstep.search.measure import Measurer
from fewstep.search.plan_search import FRESH, PROOF
from fewstep.search.space import plan_key

TIMES = (950.0, 800.0, 620.0, 430.0, 260.0, 140.0, 60.0)
GRIDS = tuple(combinations(TIMES, 3))
TEACHER = Plan(
    solver=DiffusersSolver(scheduler="DDIMScheduler"), grid=ExplicitGrid(timesteps=tuple(range(999, 0, -40)))
)
BASE = Plan(solver=DiffusersSolver(scheduler="DDIMScheduler"), grid=ExplicitGrid(timesteps=GRIDS[0]))


@dataclass(frozen=True)
class AnyOf:
    """One of some grids, by number."""

    grids: tuple[tuple[float, ...], ...]
    name: str = "any"

    def suggest(self, trial: Any, plan: Plan) -> Plan:
        number = trial.suggest_int("any.number", 0, len(self.grids) - 1)
        return plan.model_copy(update={"grid": ExplicitGrid(timesteps=self.grids[number])})

    def params(self, plan: Plan) -> dict[str, Any]:
        try:
            return {"any.number": self.grids.index(plan.grid.timesteps)}
        except ValueError:
            raise InputError("another grid") from None


@pytest.fixture(scope="module")
def pipe():
    return mixture_pipeline()


@pytest.fixture
def setting(tmp_path):
    return SearchSetting(storage=str(tmp_path / "study"), trials=len(GRIDS), fresh_n=64, batch_size=64)


def run(pipe, setting, grids=GRIDS, objective=None, **options):
    objective = objective or Objective("relative_error", rungs=(16, 48))
    space = Space(BASE, (AnyOf(grids),))
    return search(pipe, space, objective, mixture_call, setting, teacher=TEACHER, **options)


def brute_force(pipe, grids, n, first=0, objective=None):
    objective = objective or Objective("relative_error", rungs=(n,))
    measurer = Measurer(pipe, objective, mixture_call, teacher=TEACHER, first=first)
    plans = [BASE.model_copy(update={"grid": ExplicitGrid(timesteps=grid)}) for grid in grids]
    return [measurer.measure(plan, n) for plan in plans]


def error(measured):
    return measured.values["relative_error"].value


def test_finds_the_best_of_all_grids(pipe, setting):
    """Every plan of the space is measured, the best few on fresh samples, and the least error there wins."""
    found = run(pipe, setting)
    table = brute_force(pipe, GRIDS, 48)
    finished = [candidate for candidate in found.history if candidate.state == "complete"]
    by_key = {plan_key(each.plan): error(each) for each in table}
    for candidate in finished:
        assert candidate.at_search.quality.value == by_key[plan_key(candidate.plan)]
    assert plan_key(found.front[0].plan) == plan_key(min(table, key=error).plan)
    fresh = brute_force(pipe, [candidate.plan.grid.timesteps for candidate in found.front], 64, FRESH)
    assert plan_key(found.plan) == plan_key(min(fresh, key=error).plan)
    assert [candidate.fresh.quality.value for candidate in found.front] == list(map(error, fresh))


def test_finds_it_without_looking_at_all(pipe, setting):
    found = run(pipe, replace(setting, trials=25, seed=1))
    fresh = sorted(map(error, brute_force(pipe, GRIDS, 64, FRESH)))
    assert found.best.fresh.quality.value <= fresh[1]


def test_the_front_is_on_the_front_of_all_plans(pipe, setting):
    grids = (*GRIDS[::3], *combinations(TIMES[::2], 2), *combinations(TIMES[::2], 4))
    objective = Objective("relative_error", cost="nfe", rungs=(48,))
    found = run(pipe, replace(setting, trials=len(grids), confirm=9), grids, objective)
    table = brute_force(pipe, grids, 48)
    for candidate in found.front:
        scored = candidate.at_search
        cheaper = [error(each) for each in table if each.costs["nfe"] <= scored.costs["nfe"]]
        assert scored.quality.value == min(cheaper)
    costs = [candidate.at_search.costs["nfe"] for candidate in found.front]
    assert costs[:2] == [2.0, 3.0]
    assert costs == sorted(set(costs))


def test_nothing_is_chosen_on_the_samples_of_the_evidence(pipe, setting):
    worse = BASE.model_copy(update={"grid": ExplicitGrid(timesteps=(999.0, 998.0, 997.0))})
    setting = replace(setting, trials=8, first_seed=7)
    found = run(pipe, setting, baselines={"worse": worse, "plain": BASE}, command="the command")
    own, difference = found.plan.evidence
    assert own.seeds == (7 + PROOF, 7 + PROOF + 64)
    assert found.settings["fresh_seeds"] == (7 + FRESH, 7 + FRESH + 64)
    both = brute_force(pipe, [found.plan.grid.timesteps, GRIDS[0]], 64, PROOF)
    assert own.value == error(both[0])
    gap = paired_difference(*(measured.values["relative_error"] for measured in both))
    assert (difference.value, difference.se) == (gap.value, gap.se)
    assert (difference.metric, difference.against) == ("relative_error difference", "plain")
    assert own.command == difference.command == "the command"
    assert [candidate.title for candidate in found.baselines] == ["worse", "plain"]
    on_fresh = brute_force(pipe, [GRIDS[0], found.plan.grid.timesteps], 64, FRESH)
    gap = paired_difference(*(measured.values["relative_error"] for measured in on_fresh))
    assert (found.baselines[1].gap.value, found.baselines[1].gap.se) == (gap.value, gap.se)
    assert found.plan.tuned_for.steps == 3


def test_limits_are_kept_on_both_sets_of_samples(pipe, setting):
    grids = (*GRIDS[:6], *tuple(combinations(TIMES, 5))[::3])
    objective = Objective("relative_error", limits=(Limit.parse("nfe<=3"),), rungs=(48,))
    found = run(pipe, replace(setting, trials=len(grids)), grids, objective)
    assert found.best.fresh.costs["nfe"] == 3.0
    assert any(not candidate.holds for candidate in found.history)
    limit = Objective("relative_error", limits=(Limit.parse("nfe<=2"),), rungs=(48,))
    with pytest.raises(InputError, match=r"none of 5 candidates kept to the limits nfe<=2; relax them"):
        run(pipe, replace(setting, trials=5, name="other"), GRIDS[:6], limit)


def test_a_finished_search_is_not_measured_again(pipe, setting):
    first = run(pipe, replace(setting, trials=10))
    calls = []

    def call(numbers):
        calls.append(numbers)
        return mixture_call(numbers)

    space = Space(BASE, (AnyOf(GRIDS),))
    objective = Objective("relative_error", rungs=(16, 48))
    again = search(pipe, space, objective, call, replace(setting, trials=10), teacher=TEACHER)
    assert again.plan == first.plan
    assert again.history == first.history
    assert again.front == first.front
    assert not calls
    assert again.spent == first.spent


def test_what_was_spent_is_what_the_network_saw_in_all_sittings(pipe, setting):
    """Also of a teacher that is timed for a limit alone, and of rounds that an earlier sitting measured."""
    rows = []
    (network,) = denoisers(pipe).values()
    seen = network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    objective = Objective("relative_error", limits=(Limit.parse("latency_s<=1000*teacher"),), rungs=(16, 48))
    try:
        for trials in (3, 4):
            found = run(pipe, replace(setting, trials=trials), objective=objective)
            assert found.spent == sum(rows)
    finally:
        seen.remove()


def test_more_trials_go_on_with_the_same_study(pipe, setting):
    first = run(pipe, replace(setting, trials=6))
    more = run(pipe, replace(setting, trials=9))
    assert [candidate.plan for candidate in more.history[:6]] == [candidate.plan for candidate in first.history]
    assert len(more.history) == 9


def test_starts_come_first_and_those_outside_the_space_are_left_out(pipe, setting):
    wanted = [BASE.model_copy(update={"grid": ExplicitGrid(timesteps=grid)}) for grid in (GRIDS[4], (5.0,), GRIDS[2])]
    found = run(pipe, replace(setting, trials=3), starts=wanted)
    assert [candidate.plan.grid.timesteps for candidate in found.history[:2]] == [GRIDS[4], GRIDS[2]]


def test_the_pipeline_is_as_it_was_and_the_report_is_written(pipe, setting, tmp_path):
    scheduler = pipe.scheduler
    plain = pipe(**mixture_call([0])).images
    found = run(pipe, replace(setting, trials=4))
    assert pipe.scheduler is scheduler
    assert (pipe(**mixture_call([0])).images == plain).all()
    found.save(tmp_path / "found.json")
    assert Found.load(tmp_path / "found.json").plan == found.plan
    assert "relative_error" in write_search_report(tmp_path / "report.html", found).read_text()


def test_another_search_in_the_same_study_is_refused(pipe, setting):
    run(pipe, replace(setting, trials=2))
    with pytest.raises(InputError, match="rungs"):
        run(pipe, replace(setting, trials=2), objective=Objective("relative_error", rungs=(8, 48)))


@pytest.mark.parametrize("name", ["trials", "confirm", "fresh_n", "batch_size"])
def test_numbers_that_make_no_sense(name):
    with pytest.raises(InputError, match=f"{name} of a search is at least 1; got 0"):
        SearchSetting(storage="x", **{name: 0})


def test_too_few_fresh_samples_are_refused_before_the_first_trial(pipe, setting):
    setting = replace(setting, fresh_n=6)
    with pytest.raises(InputError, match="fd needs at least 8 images, twice the 4 dimensions of toy; got 6"):
        run(pipe, setting, objective=Objective("fd", rungs=(8,)), judges=toy_judges())
    with pytest.raises(InputError, match="fd needs at least 8 images, twice the 4 dimensions of toy; got 6"):
        run(pipe, setting, objective=Objective("relative_error", rungs=(4,)), also=("fd",), judges=toy_judges())
    assert not Path(setting.storage).exists()


def test_the_global_generator_is_left_alone(pipe, setting):
    state = torch.get_rng_state()
    run(pipe, replace(setting, trials=2))
    assert torch.equal(torch.get_rng_state(), state)
