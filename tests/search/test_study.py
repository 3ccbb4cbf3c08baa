"""Studies of one worker: what is found, resumed, stopped early, told apart and refused."""

import itertools
import json
import logging
import math
import warnings

import optuna
import pytest
from optuna.trial import TrialState
from packaging.version import Version
from toy_study import SMALL, SPACINGS, STEPS, WIDE, Measure, loss_of, measured, nsga2, setting_of, told, tpe

from fewstep.samplers import InputError, Plan, SpacingGrid
from fewstep.search.space import plan_key
from fewstep.search.study import Outcome, SearchWarning, StudySetting, finished_trials, run_study
from fewstep.search.study_storage import study_url


def all_plans():
    return [Plan(grid=SpacingGrid(steps=n, spacing=s)) for n, s in itertools.product(range(1, STEPS + 1), SPACINGS)]


def just_loss(plan, keep_on):
    return Outcome((loss_of(plan),))


@pytest.mark.parametrize("sampler", [tpe, nsga2])
def test_a_space_that_is_used_up_was_measured_whole_and_once(tmp_path, sampler):
    log = tmp_path / "log"
    with pytest.warns(SearchWarning, match="used up after 24 of 50 trials: nothing but plans"):
        study = run_study(setting_of(tmp_path, 50), SMALL, Measure(log, rungs=()), sampler)
    assert sorted(measured(log)) == sorted(plan_key(plan) for plan in all_plans())
    assert study.user_attrs["used_up"] == 24
    assert len(study.trials) == 24  # suggestions that are known leave no trial
    best = min(all_plans(), key=loss_of)
    assert study.best_trial.user_attrs["plan"] == plan_key(best)
    assert study.best_value == loss_of(best)


def test_the_front_of_two_objectives_is_that_of_brute_force(tmp_path):
    directions = ("minimize", "minimize")
    with pytest.warns(SearchWarning, match="used up"):
        study = run_study(
            setting_of(tmp_path, 40, directions=directions), SMALL, Measure(tmp_path / "log", objectives=2), nsga2
        )
    points = {(loss_of(plan), float(plan.grid.steps)) for plan in all_plans()}
    front = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert {tuple(trial.values) for trial in study.best_trials} == front
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)  # nothing is stopped early


@pytest.mark.parametrize(("sampler", "objectives"), [(tpe, 1), (tpe, 2), (nsga2, 2)])
def test_a_study_in_pieces_is_the_study_in_one(tmp_path, sampler, objectives):
    directions = ("minimize",) * objectives
    starts = [{"grid.steps": 4, "grid.spacing": "trailing", "grid.twist": False, "guidance.scale": 2.0}]

    def run(name, trials):
        measure = Measure(tmp_path / f"{name}.log", objectives=objectives, rungs=(64, 256))
        setting = setting_of(tmp_path / name, trials, directions=directions)
        return run_study(setting, WIDE, measure, sampler, starts)

    whole = told(run("whole", 18))
    for trials in (1, 2, 9, 9, 14, 18):
        parts = told(run("parts", trials))
        assert parts == whole[:trials]


def test_an_exception_ends_the_worker_and_its_trial_does_not_count(tmp_path):
    whole = told(run_study(setting_of(tmp_path / "whole", 12), WIDE, just_loss, tpe))
    calls = itertools.count()

    def clumsy(plan, keep_on):
        if next(calls) % 3 == 2:
            raise KeyboardInterrupt
        return just_loss(plan, keep_on)

    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            run_study(setting_of(tmp_path / "parts", 12), WIDE, clumsy, tpe)
    study = run_study(setting_of(tmp_path / "parts", 12), WIDE, clumsy, tpe)
    assert told(study) == whole
    failed = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    assert [trial.user_attrs["failed"] for trial in failed] == ["KeyboardInterrupt()"] * 5


def test_another_seed_is_another_search(tmp_path):
    one = run_study(setting_of(tmp_path / "3", 6), WIDE, just_loss, tpe)
    other = run_study(setting_of(tmp_path / "4", 6, seed=4), WIDE, just_loss, tpe)
    assert not {plan for *_, plan in told(one)} & {plan for *_, plan in told(other)}


def test_starts_come_first_in_order_and_once(tmp_path):
    plans = [all_plans()[index] for index in (20, 3, 11)]
    starts = [SMALL.params(plan) for plan in plans]
    starts.insert(1, starts[0] | {"grid.twist": True})  # the first plan again, in other parameters
    log = tmp_path / "log"
    for trials in (2, 6):
        study = run_study(setting_of(tmp_path, trials), SMALL, Measure(log), tpe, starts)
    assert measured(log)[:3] == [plan_key(plan) for plan in plans]
    assert len(set(measured(log))) == len(study.trials) == 6


@pytest.mark.parametrize(
    ("start", "why"),
    [
        ({"grid.steps": 99, "grid.spacing": "leading", "grid.twist": False}, "99"),
        ({"grid.steps": 4}, "grid.spacing"),
        ({"grid.steps": 4, "grid.spacing": "odd", "grid.twist": False}, "odd"),
    ],
)
def test_a_start_outside_of_the_space_is_refused(tmp_path, start, why):
    with pytest.raises(InputError, match=rf"^start 0 .* is not in the space: .*{why}"):
        run_study(setting_of(tmp_path, 3), SMALL, just_loss, tpe, [start])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("direction", "reduction"), [("minimize", 2), ("minimize", 3), ("maximize", 3)])
def test_a_rung_keeps_the_best_of_what_was_reported_there_so_far(tmp_path, direction, reduction):
    sign = 1 if direction == "minimize" else -1
    seen, expected, got = {64: [], 256: []}, [], []

    def rule(n, value):
        seen[n].append(sign * value)
        rank = sorted(seen[n]).index(sign * value)
        return len(seen[n]) <= reduction or rank < math.ceil(len(seen[n]) / reduction)

    def evaluate(plan, keep_on):
        for n in (64, 256):
            value = sign * (loss_of(plan) + math.sin(n * plan.grid.steps))
            expected.append(rule(n, value))
            got.append(keep_on(n, value))
            if not got[-1]:
                return Outcome(())
        return Outcome((value,))

    setting = setting_of(tmp_path, 20, directions=(direction,), reduction=reduction)
    study = run_study(setting, WIDE, evaluate, tpe)
    assert got == expected
    assert 0 < got.count(False) < 20
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.PRUNED) == got.count(False)
    assert states.count(TrialState.COMPLETE) == 20 - got.count(False)
    for trial in study.trials:
        if trial.state == TrialState.PRUNED:
            assert trial.value == trial.intermediate_values[max(trial.intermediate_values)]


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (Outcome((), failed="the images overflow"), "the images overflow"),
        (Outcome((math.nan,)), "not finite: values (nan,), violations (0.0,)"),
        (Outcome((-math.inf,)), "not finite: values (-inf,), violations (0.0,)"),
    ],
)
def test_a_broken_candidate_counts_and_is_not_tried_again(tmp_path, outcome, why):
    def evaluate(plan, keep_on):
        evaluated.append(plan_key(plan))
        if plan.grid.spacing == "leading":
            violations = () if outcome.failed else (0.0,)
            return Outcome(outcome.values, violations, {"spent": 7}, outcome.failed)
        return Outcome((loss_of(plan),), (-1.0,))

    evaluated = []
    with pytest.warns(SearchWarning, match="used up after 24"):
        study = run_study(setting_of(tmp_path, 25, constraints=True), SMALL, evaluate, tpe)
    assert len(evaluated) == len(set(evaluated)) == 24
    broken = [trial for trial in study.trials if "failed" in trial.user_attrs]
    assert len(broken) == STEPS
    assert {trial.user_attrs["failed"] for trial in broken} == {why}
    assert all(trial.state == TrialState.PRUNED and trial.user_attrs["spent"] == 7 for trial in broken)
    assert len(finished_trials(study)) == len(study.trials)


def test_a_value_that_is_no_number_is_not_kept(tmp_path):
    def evaluate(plan, keep_on):
        assert not keep_on(64, math.nan)
        return Outcome(())

    study = run_study(setting_of(tmp_path, 2), SMALL, evaluate, tpe)
    assert [trial.state for trial in study.trials] == [TrialState.PRUNED] * 2


@pytest.mark.skipif(Version(optuna.__version__) < Version("5"), reason="the sampler has to be told of constraints")
@pytest.mark.parametrize("sampler", [tpe, nsga2])
def test_samplers_and_the_best_trial_see_violations(tmp_path, sampler):
    def constrained(plan, keep_on):
        return Outcome((loss_of(plan),), (plan.grid.steps - 4.0,))

    def allowed(study):
        return [trial.params["grid.steps"] <= 4 for trial in study.trials[16:]]

    study = run_study(setting_of(tmp_path / "constrained", 32, constraints=True), WIDE, constrained, sampler)
    free = run_study(setting_of(tmp_path / "free", 32), WIDE, just_loss, sampler)
    assert study.best_trial.params["grid.steps"] <= 4 < free.best_trial.params["grid.steps"]
    assert sum(allowed(study)) > sum(allowed(free))


def test_notes_are_kept(tmp_path):
    notes = {"fd": {"value": 1.5, "se": 0.1}, "spent": 1280}
    study = run_study(setting_of(tmp_path, 1), SMALL, lambda plan, keep_on: Outcome((1.0,), notes=notes), tpe)
    assert notes.items() <= study.trials[0].user_attrs.items()


def test_progress_is_told_after_each_trial(tmp_path):
    told_of = []
    run_study(
        setting_of(tmp_path, 4), SMALL, just_loss, tpe, progress=lambda s: told_of.append(len(finished_trials(s)))
    )
    assert told_of == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 5}, "seed = 3, this search has 5;"),
        ({"key": {"space": {"axes": ["grid"], "steps": 9}}}, "space.steps = 8, this search has 9;"),
        (
            {"key": {"space": {"axes": ["grid", "cache"]}}},
            r'space.axes = \["grid"\], this search has \["grid", "cache"\];',
        ),
        ({"key": {"space": {"axes": ["grid"], "steps": STEPS}, "n": 64}}, "n = null, this search has 64;"),
        ({"directions": ("maximize",)}, r'directions = \["minimize"\], this search has \["maximize"\];'),
        ({"reduction": 4}, "reduction = 3, this search has 4;"),
        ({"key": {"space": "x" * 200}}, r'this search has "x{76}\.\.\.;'),
    ],
)
def test_the_study_of_another_search_is_refused(tmp_path, changes, words):
    run_study(setting_of(tmp_path, 1), SMALL, just_loss, tpe)
    with pytest.raises(InputError, match=rf"^the study 'toy' in sqlite:.*study.db was begun with .*{words}") as error:
        run_study(setting_of(tmp_path, 2, **changes), SMALL, just_loss, tpe)
    assert str(error.value).endswith("give another --study folder, or the same settings")


def test_a_study_of_something_else_is_refused(tmp_path):
    optuna.create_study(storage=study_url(tmp_path), study_name="toy").optimize(lambda trial: 1.0, n_trials=1)
    with pytest.raises(InputError, match="has trials that are not of a search; give another --study folder"):
        run_study(setting_of(tmp_path, 2), SMALL, just_loss, tpe)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite://", "would vanish with its worker; give sqlite:///study.db or postgresql"),
        ("study.db", "the study's storage 'study.db' is no URL; give sqlite:///study.db"),
        ("mysql://u:secret@h/d", r"a study is not kept in mysql \(mysql://u:\*\*\*@h/d\); give sqlite"),
        ("postgresql+pg8000://u:secret@h/d", r"u:\*\*\*@h/d is not installed; pip install 'fewstep\[postgres\]'"),
        ("postgresql://u:secret@127.0.0.1:1/d", r"cannot open the study's storage postgresql\+psycopg://u:\*\*\*@"),
    ],
)
def test_storages_that_cannot_be_used_are_refused(url, words):
    setting = StudySetting(url, "toy", {}, trials=1, seed=0)
    with pytest.raises(InputError, match=words) as error:
        run_study(setting, SMALL, just_loss, tpe)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_database_is_refused_and_left(tmp_path):
    (tmp_path / "study.db").write_text("these are notes, and no database at all" * 100)
    with pytest.raises(InputError, match=r"cannot open the study's storage .*: file is not a database"):
        run_study(setting_of(tmp_path, 1), SMALL, just_loss, tpe)
    assert (tmp_path / "study.db").read_text().startswith("these are notes")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trials": 0}, "at least 1 trial; got 0"),
        ({"seed": -1}, "seed is at least 0; got -1"),
        ({"directions": ("up",)}, r"minimize or maximize; got \('up',\)"),
        ({"reduction": 1}, "reduction is at least 2; got 1"),
        ({"heartbeat_s": 20}, "got every 20 s for 20 s"),
    ],
)
def test_settings_are_checked(changes, words):
    with pytest.raises(InputError, match=words):
        StudySetting("sqlite:///x", "toy", **({"key": {}, "trials": 1, "seed": 0} | changes))


def test_optuna_is_quiet_and_its_verbosity_left(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="optuna")
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.enable_propagation()
    try:
        with warnings.catch_warnings(action="error"):
            run_study(setting_of(tmp_path, 3), SMALL, just_loss, tpe)
        assert not caplog.records
        optuna.create_study()
        assert "A new study created in memory" in caplog.text
    finally:
        optuna.logging.disable_propagation()
        optuna.logging.set_verbosity(verbosity)


def test_a_folder_with_braces_holds_a_study(tmp_path):
    study = run_study(setting_of(tmp_path / "{name} 100%", 1), SMALL, just_loss, tpe)
    assert len(study.trials) == 1
    assert (tmp_path / "{name} 100%" / "study.db").is_file()


def test_the_identity_of_a_setting_is_json(tmp_path):
    identity = setting_of(tmp_path, 1).identity
    assert json.loads(json.dumps(identity)) == identity
