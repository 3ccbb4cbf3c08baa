"""Gaussian processes in a trust region: boxes that follow the best trial, from the history alone."""

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from fewstep.samplers import InputError
from fewstep.search.trust_region import FROM, TrustRegion, TrustRegionSampler, compressed

optuna.logging.set_verbosity(optuna.logging.WARNING)

START = {f"x{i}": 0.3 for i in range(6)} | {"kind": "a"}


def cliff(trial):
    """Least, 0, at x = 0.2 in six dimensions and for kind b; a hundred times as much beyond a cliff, as with plans."""
    x = [trial.suggest_float(f"x{i}", -1.0, 1.0) - 0.2 for i in range(6)]
    kind = {"a": 0.05, "b": 0.0}[trial.suggest_categorical("kind", ["a", "b"])]
    return sum((1 + 3 * i) * v * v for i, v in enumerate(x)) + kind + 1000 * max(0.0, max(map(abs, x)) - 0.4)


def studied(make, count, objective=cliff):
    study = optuna.create_study()
    study.enqueue_trial(START)
    for number in range(count):
        study.sampler = make(number)
        study.optimize(objective, n_trials=1)
    return study


def test_goes_further_among_cliffs_than_the_whole_space_allows():
    """The start has 0.56. After 40 trials, the worse of two seeds against the better of two."""
    ours = max(studied(lambda n, s=s: TrustRegionSampler(100 * s + n), 40).best_value for s in range(2))
    theirs = min(
        studied(lambda n, s=s: optuna.samplers.TPESampler(seed=100 * s + n, multivariate=True), 40).best_value
        for s in range(2)
    )
    assert ours < 0.1
    assert ours < 0.5 * theirs


def test_depends_on_the_finished_trials_and_the_seed_alone():
    study = studied(TrustRegionSampler, 10)
    draws = []
    for _ in range(2):
        again = optuna.create_study(sampler=TrustRegionSampler(99))
        again.add_trials(study.trials)
        draws.append(again.ask(dict(study.trials[0].distributions)).params)
    assert draws[0] == draws[1]


def test_proposals_are_in_the_box_or_change_one_choice():
    study = studied(lambda n: TrustRegionSampler(n, TrustRegion(first=0.1, grow_after=99, shrink_after=99)), 25)
    for trial in study.trials[1:]:
        centre = study.trials[trial.system_attrs[FROM]].params
        moved = {name for name in START if trial.params[name] != centre[name]}
        assert moved == {"kind"} or "kind" not in moved
        assert all(abs(trial.params[name] - centre[name]) <= 0.2 + 1e-9 for name in moved - {"kind"})


def test_the_box_halves_when_nothing_helps_and_doubles_when_all_does():
    setting = TrustRegion(first=0.2, grow_after=2, shrink_after=3)
    for value, half in ((lambda n: 1.0, 0.1), (lambda n: -float(n), 0.4)):
        study = optuna.create_study()
        for number in range(4):
            where = {"x": FloatDistribution(0, 1)}
            attrs = {} if number == 0 else {FROM: 0 if value(1) > 0 else number - 1}
            study.add_trial(
                optuna.create_trial(params={"x": 0.5}, distributions=where, value=value(number), system_attrs=attrs)
            )
        sampler = TrustRegionSampler(0, setting)
        ranks = [sampler._rank(study, trial) for trial in study.trials]
        assert sampler._half(study.trials, ranks) == half


def test_trials_within_the_limits_come_before_better_ones():
    where = {"x": FloatDistribution(0, 1)}
    study = optuna.create_study()
    for x, violation in ((0.2, 0.5), (0.7, 0.0), (0.9, -1.0)):
        study.add_trial(
            optuna.create_trial(params={"x": x}, distributions=where, value=x, user_attrs={"violation": violation})
        )
    study.add_trial(optuna.create_trial(state=TrialState.PRUNED, params={"x": 0.1}, distributions=where, value=0.0))
    study.sampler = TrustRegionSampler(0, constraints=lambda trial: (trial.user_attrs.get("violation", 0.0),))
    study.ask(where)
    assert study.trials[-1].system_attrs[FROM] == 1


def test_compression_keeps_the_order_and_tames_what_is_far():
    values = [5.1, 5.2, 6.0, 900.0, 8.0]
    found = compressed([(0, value) for value in values])
    assert sorted(range(5), key=found.__getitem__) == sorted(range(5), key=values.__getitem__)
    assert min(found) == 0.0
    assert max(found) < 10
    mixed = compressed([(1, 0.1), (0, 900.0), (0, 5.0), (1, 0.4)])
    assert mixed[2] < mixed[1] < mixed[0] < mixed[3]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InputError, match=r"half a side is above 0 and at most 0\.5; got first 0\.7"):
        TrustRegion(first=0.7)
    with pytest.raises(InputError, match="counts are at least 1"):
        TrustRegion(enough=0)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=TrustRegionSampler(0))
    with pytest.raises(InputError, match="a trust region has one objective; take nsga2 for two"):
        study.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 0.0), n_trials=2)
