"""Studies whose workers are killed, and studies that two workers share."""

import itertools
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from contextlib import closing

import pytest
from optuna.trial import TrialState
from toy_study import SMALL, WIDE, Measure, check_shared, measured, nsga2, setting_of, start_worker, told, tpe

from fewstep.search.claims import Claims, is_dead, this_process
from fewstep.search.proposals import Proposer
from fewstep.search.study import SearchWarning, finished_trials, run_study
from fewstep.search.study_storage import open_storage, open_study

KILLS = 10


def killed_at_random(draw, most_s, *arguments):
    """Whether a worker was killed before it was done."""
    process = start_worker(*arguments)
    process.join(draw.uniform(0, most_s))
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize(("sampler", "objectives"), [(tpe, 1), (nsga2, 2)])
def test_a_study_killed_ten_times_is_the_study_that_was_not(tmp_path, sampler, objectives):
    directions = ("minimize",) * objectives
    starts = [{"grid.steps": 7, "grid.spacing": "linspace", "grid.twist": True, "guidance.scale": 3.0}]

    def arguments(name):
        measure = Measure(tmp_path / f"{name}.log", 0.02, objectives, rungs=(64, 256))
        return setting_of(tmp_path / name, 20, directions=directions), WIDE, measure, sampler, starts

    begun = time.monotonic()
    whole = run_study(*arguments("whole"))
    most_s = (time.monotonic() - begun) / KILLS
    draw = random.Random(1)
    kills = sum(killed_at_random(draw, most_s, *arguments("killed")) for _ in range(KILLS))
    begun = time.monotonic()
    study = run_study(*arguments("killed"))
    assert time.monotonic() - begun < setting_of(tmp_path, 1).grace_s  # the dead are not waited for
    assert kills == KILLS
    assert told(study) == told(whole)
    assert len(finished_trials(study)) == 20
    assert [t.user_attrs["plan"] for t in study.best_trials] == [t.user_attrs["plan"] for t in whole.best_trials]
    assert all(trial.state.is_finished() for trial in study.trials)
    with closing(sqlite3.connect(tmp_path / "killed" / "study.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("trials", [15, 24])
def test_two_workers_measure_each_plan_once(tmp_path, trials):
    log = tmp_path / "log"
    arguments = (setting_of(tmp_path / "study", trials), SMALL, Measure(log, 0.02), tpe)
    workers = [start_worker(*arguments) for _ in range(2)]  # the tables are made at the same moment, too
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    check_shared(log, run_study(*arguments), trials)


def test_workers_share_a_space_to_its_last_plan(tmp_path):
    log = tmp_path / "log"
    arguments = (setting_of(tmp_path / "study", 99), SMALL, Measure(log, 0.02), nsga2)
    worker = start_worker(*arguments)
    with pytest.warns(SearchWarning, match="used up after 24 of 99 trials"):
        study = run_study(*arguments)
    worker.join()
    assert worker.exitcode == 0
    check_shared(log, study, 24)


def test_a_worker_goes_on_when_the_other_is_killed(tmp_path):
    log = tmp_path / "log"
    setting = setting_of(tmp_path, 12, grace_s=300)  # however long twelve trials take on a busy machine
    slow = start_worker(setting, WIDE, Measure(log, 60.0), tpe)
    while not log.exists():
        time.sleep(0.02)
    os.kill(slow.pid, signal.SIGSTOP)  # neither dead nor at work
    other = start_worker(setting, WIDE, Measure(log), tpe)
    while len(measured(log)) < 12:
        time.sleep(0.02)
    other.join(1.0)
    assert other.is_alive()  # it waits for the twelfth trial, and does not measure a thirteenth
    assert len(measured(log)) == 12
    slow.kill()
    slow.join()
    other.join(20)
    assert other.exitcode == 0
    study = run_study(setting, WIDE, Measure(log), tpe)
    assert len(measured(log)) == 13
    assert len(finished_trials(study)) == 12
    assert [trial.state for trial in study.trials].count(TrialState.FAIL) == 1


def test_a_file_appears_with_all_its_tables_or_not_at_all(tmp_path, monkeypatch):
    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sqlalchemy.sql.ddl.SchemaGenerator.visit_index", killed)  # after the first table
        with pytest.raises(KeyboardInterrupt):
            claims_of(tmp_path, 1)
    assert not list(tmp_path.iterdir())
    claims_of(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    with closing(sqlite3.connect(tmp_path / "study.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        indices = connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'").fetchall()
    assert ("ix_studies_study_name",) in indices


def claims_of(folder, trials):
    setting = setting_of(folder, trials, heartbeat_s=1, grace_s=2)
    storage = open_storage(setting.storage, setting.heartbeat_s, setting.grace_s)
    return Claims(storage, open_study(storage, setting.name, setting.directions, setting.identity), trials)


def test_of_two_claims_of_a_plan_and_of_the_last_trial_the_first_holds(tmp_path):
    one, other = claims_of(tmp_path, 2), claims_of(tmp_path, 2)
    proposer = Proposer(WIDE, tpe, 0, ("minimize",), ())
    first = proposer.propose([], [], set())
    second = proposer.propose([], [], {first.key})
    assert first.key != second.key
    a, b, c, d = one.claim(first), other.claim(first), other.claim(second), one.claim(second)
    assert (a.holds, b.holds, c.holds, d.holds) == (True, False, False, False)  # b is before c until it withdraws
    b.tell(TrialState.FAIL)
    assert (a.holds, c.holds, d.holds) == (True, True, False)
    a.tell(TrialState.COMPLETE, [1.0])
    assert (c.holds, d.holds) == (True, False)
    c.tell(TrialState.COMPLETE, [2.0])
    third = proposer.propose([], [], {first.key, second.key})
    assert not one.claim(third).holds


def test_the_trial_of_a_worker_elsewhere_is_failed_when_its_grace_is_over(tmp_path, monkeypatch):
    there, here = claims_of(tmp_path, 9), claims_of(tmp_path, 9)
    proposer = Proposer(WIDE, tpe, 0, ("minimize",), ())
    monkeypatch.setattr("fewstep.search.claims._machine", lambda: "elsewhere")
    silent = there.claim(proposer.propose([], [], set()))  # killed before its first sign of life
    alive = there.claim(proposer.propose([], [], {silent.key}))
    monkeypatch.undo()
    with alive:
        begun = time.monotonic()
        assert len(here.standing().running) == 2
        while len(here.standing().running) == 2:
            assert time.monotonic() - begun < 10
            time.sleep(0.1)
        assert time.monotonic() - begun > 1.5
        assert [trial.number for trial in here.standing().running] == [alive.number]


def test_a_worker_that_was_taken_for_dead_goes_on(tmp_path):
    killed = itertools.count()

    def evaluate(plan, keep_on):
        if next(killed) == 0:
            claims = claims_of(tmp_path, 3)
            claims.storage.set_trial_state_values(1, TrialState.FAIL)
        return measure(plan, keep_on)

    measure = Measure(tmp_path / "log")
    with pytest.warns(SearchWarning, match="trial 0 gave no sign of life for 2 s .* its plan is measured again"):
        study = run_study(setting_of(tmp_path, 3, heartbeat_s=1, grace_s=2), WIDE, evaluate, tpe)
    plans = measured(tmp_path / "log")
    assert plans[0] == plans[1]
    assert len(finished_trials(study)) == 3


def test_dead_processes_are_told_from_live_ones():
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    mine = this_process()
    its = mine | {"pid": process.pid, "born": mine["born"]}
    assert not is_dead(mine)
    assert is_dead(its)  # another process with the number of one that ended
    process.kill()
    while not is_dead(mine | {"pid": process.pid}):  # not waited for yet, so still in the table of processes
        time.sleep(0.01)
    process.join()
    assert is_dead(mine | {"pid": process.pid})
    assert not is_dead(mine | {"pid": process.pid, "machine": "elsewhere"})
    assert not is_dead(None)
