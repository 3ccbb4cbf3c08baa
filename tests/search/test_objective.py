"""Objectives and their limits: what they say, how far a candidate is from them, and what they refuse."""

import pytest

from fewstep.eval import Estimate
from fewstep.eval.metrics import KINDS
from fewstep.samplers import InputError, Plan
from fewstep.search.measure import Measured
from fewstep.search.objective import COSTS, PAIRED, QUALITIES, Limit, Objective


def measured(values, costs=None):
    return Measured(Plan(), 8, {name: Estimate(value, 0.1, 8) for name, value in values.items()}, costs or {"nfe": 5.0})


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("nfe<=5", Limit("nfe", "<=", 5.0)),
        (" latency_s <= 4e-2 ", Limit("latency_s", "<=", 0.04)),
        ("fd<=1.02*teacher", Limit("fd", "<=", 1.02, relative=True)),
        ("fd <= 1.02 * teacher", Limit("fd", "<=", 1.02, relative=True)),
        ("fd<=teacher", Limit("fd", "<=", 1.0, relative=True)),
        ("class_accuracy>=0.98*teacher", Limit("class_accuracy", ">=", 0.98, relative=True)),
        ("psnr>=-3", Limit("psnr", ">=", -3.0)),
    ],
)
def test_limits_are_read_and_written(text, limit):
    assert Limit.parse(text) == limit
    assert Limit.parse(str(limit)) == limit


@pytest.mark.parametrize("quantity", [*QUALITIES, *COSTS])
def test_good_values_are_on_one_side(quantity):
    better = KINDS[quantity].higher_is_better if quantity in KINDS else False
    good, bad = (">=", "<=") if better else ("<=", ">=")
    assert Limit.parse(f"{quantity}{good}3").violation({quantity: 3.5}) == pytest.approx(
        -0.5 / 3 if better else 0.5 / 3
    )
    with pytest.raises(InputError, match=f"good values of {quantity} are {good} the limit; got '{quantity}{bad}3'"):
        Limit.parse(f"{quantity}{bad}3")


def test_a_violation_is_a_share_of_the_limit():
    assert Limit.parse("nfe<=5").violation({"nfe": 5.0}) == 0
    assert Limit.parse("nfe<=5").violation({"nfe": 6.0}) == pytest.approx(0.2)
    assert Limit.parse("nfe<=5").violation({"nfe": 4.0}) == pytest.approx(-0.2)
    assert Limit.parse("psnr>=20").violation({"psnr": 15.0}) == pytest.approx(0.25)
    assert Limit.parse("kd<=0").violation({"kd": 0.3}) == pytest.approx(0.3)
    assert Limit.parse("fd<=1.5*teacher").violation({"fd": 12.0}, {"fd": 4.0}) == pytest.approx(1.0)
    assert Limit.parse("recall>=0.5*teacher").violation({"recall": 0.4}, {"recall": 0.8}) == pytest.approx(0.0)
    assert Limit.parse("fd<=2*teacher").violation({"fd": -3.0}, {"fd": -1.0}) == pytest.approx(-0.5)


def test_an_objective_is_minimised_and_knows_what_it_needs():
    objective = Objective("recall", "flops", (Limit.parse("nfe<=4"), Limit.parse("fd<=2*teacher")))
    candidate = measured({"recall": 0.7, "fd": 5.0})
    assert objective.loss(candidate) == -0.7
    assert Objective("fd").loss(candidate) == 5.0
    assert objective.quantities == ("recall", "flops", "nfe", "fd")
    assert objective.violations(candidate, measured({"fd": 5.0})) == pytest.approx((0.25, -0.5))
    assert objective.needs_teacher
    assert not Objective("fd", limits=(Limit.parse("fd<=3"),)).needs_teacher
    assert all(Objective(quality).needs_teacher == (quality in PAIRED) for quality in QUALITIES)
    assert {"relative_error", "psnr", "ssim", "lpips", "feature_distance"} == PAIRED
    with pytest.raises(InputError, match=r"the limit fd<=2\*teacher needs a teacher; give its plan"):
        objective.violations(candidate)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fd=3", r"a limit is a quantity, <= or >=, and a number .* such as nfe<=5 or fd<=1.02\*teacher; got 'fd=3'"),
        ("fd<=low", "got 'fd<=low'"),
        ("fd<=2*3", "got 'fd<=2\\*3'"),
        ("fd<=teacher*teacher", "got 'fd<=teacher\\*teacher'"),
        ("nef<=5", "unknown quantity 'nef'; did you mean 'nfe'"),
        ("nfe<=inf", "the value of a limit is a finite number; got 'nfe<=inf'"),
        ("nfe<=0", "a limit of nfe is above 0; got 'nfe<=0'"),
        ("fd<=-1*teacher", r"a multiple of the teacher's value is above 0; got 'fd<=-1\*teacher'"),
        ("psnr>=2*teacher", "psnr is measured against the teacher, which has none itself; .*; give a number"),
    ],
)
def test_limits_that_say_nothing_are_refused(text, words):
    with pytest.raises(InputError, match=words):
        Limit.parse(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quality": "recal"}, "unknown quality 'recal'; did you mean 'recall'"),
        ({"quality": "nfe"}, "unknown quality 'nfe'"),
        ({"cost": "latency"}, "unknown cost 'latency'; did you mean 'latency_s'"),
        ({"rungs": ()}, "rungs are numbers of images that grow, one at least; got none"),
        ({"rungs": (64, 64)}, "rungs are numbers of images that grow, one at least; got 64, 64"),
        ({"rungs": (2, 8)}, "a rung is at least 4 images, fewer have no error; got 2, 8"),
    ],
)
def test_objectives_that_cannot_be_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        Objective(**options)
