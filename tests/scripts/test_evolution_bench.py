"""The rows that searches are compared by, on trials with known costs."""

import pytest

from fewstep.eval import Estimate
from fewstep.samplers import Plan
from fewstep.scripts.bench.evolution import entry, rows_of_trials, rows_to_reach, trajectory
from fewstep.search.found import Candidate, Found, Scored


def candidate(order, value, n=100, state="complete", holds=True):
    plan = Plan.from_json({"fewstep_plan": 1, "grid": {"type": "explicit", "timesteps": [500.0 + order]}})
    reason = None if state == "complete" else "stopped"
    scored = None if state == "failed" else Scored(n, Estimate(value, 0.1, n), {}, {"nfe": 8.0})
    return Candidate(order, plan, {}, state, scored, holds=holds, reason=reason)


def found(*history, higher_is_better=False):
    best = next(each for each in history if each.state == "complete")
    return Found(best.plan, "fd", higher_is_better, None, (best,), history, spent=9000, seconds=1.0)


HISTORY = (
    candidate(0, 5.0),
    candidate(1, 1.0, n=25, state="pruned"),
    candidate(2, 6.0),
    candidate(3, 0.0, state="failed"),
    candidate(4, 2.0, holds=False),
    candidate(5, 3.0),
)


def test_rows_add_up_over_all_measured_trials_and_only_full_ones_lower_the_loss():
    search = found(*HISTORY)
    assert rows_of_trials(search) == 800 + 200 + 800 + 800 + 800
    assert list(trajectory(search)) == [(800, 5.0), (3400, 3.0)]


@pytest.mark.parametrize(("loss", "rows"), [(6.0, 800), (5.0, 800), (4.0, 3400), (2.0, None)])
def test_a_loss_is_reached_by_the_first_trial_that_has_it(loss, rows):
    assert rows_to_reach(found(*HISTORY), loss) == rows


def test_of_a_quality_that_is_better_the_higher_the_highest_counts():
    assert list(trajectory(found(*HISTORY, higher_is_better=True))) == [(800, -5.0), (1800, -6.0)]


def test_an_entry_counts_trials_by_what_became_of_them():
    said = entry(found(*HISTORY))
    assert said["trials"] == {"complete": 4, "failed": 1, "pruned": 1}
    assert (said["rows"], said["rows_of_trials"]) == (9000, 3400)
