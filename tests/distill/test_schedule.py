import pytest
import torch
from diffusers.optimization import get_scheduler

from fewstep.distill.schedule import Average, Counters, Schedule, Stage, rate_factor


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts"])
def test_rate_is_that_of_the_host_stepped_one_by_one(name):
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    schedule = get_scheduler(name, optimiser, num_warmup_steps=3, num_training_steps=10)
    for step in range(10):
        assert 0.3 * rate_factor(name, step, 3, 10) == pytest.approx(optimiser.param_groups[0]["lr"], abs=1e-12)
        optimiser.step()
        schedule.step()


def walk(schedule, turns):
    counters = Counters()
    for _ in range(turns):
        stage = schedule.due(counters)
        if stage > counters.stage:
            counters = schedule.entered(counters, stage)
        yield counters, schedule.updates(counters)
        counters = schedule.after(counters)


def test_five_updates_of_the_fake_for_one_of_the_student():
    schedule = Schedule((Stage((("fake",),) * 4 + (("fake", "student"),)),))
    seen = list(walk(schedule, 15))
    assert [("student" in roles) for _, roles in seen] == ([False] * 4 + [True]) * 3
    assert all("fake" in roles for _, roles in seen)
    assert [counters.step for counters, _ in seen] == [0] * 5 + [1] * 5 + [2] * 5
    assert [counters.turn for counters, _ in seen] == list(range(15))


def test_either_or_alternation_and_the_roles_in_order():
    schedule = Schedule((Stage((("student",), ("fake",))),))
    assert [roles for _, roles in walk(schedule, 4)] == [("student",), ("fake",)] * 2
    assert schedule.roles == ("student", "fake")


def test_a_stage_begins_its_cycle_anew():
    warm_up = Stage()
    schedule = Schedule((warm_up, Stage((("fake",), ("student", "fake")), start=3)))
    seen = [(counters.stage, counters.step, roles) for counters, roles in walk(schedule, 6)]
    assert seen[:3] == [(0, step, ("student",)) for step in range(3)]
    assert seen[3:] == [(1, 3, ("fake",)), (1, 3, ("student", "fake")), (1, 4, ("fake",))]


def test_learning_rates_can_be_annealed_within_each_stage():
    stages = (Stage(), Stage(start=4), Stage(start=10))
    spans = [
        Schedule(stages, anneal_stages=True).span(Counters(step, 0, stage), 12) for stage, step in enumerate((3, 5, 10))
    ]
    assert spans == [(3, 4), (1, 6), (0, 2)]
    assert Schedule(stages).span(Counters(5, 0, 1), 12) == (5, 12)


def test_a_decay_may_depend_on_the_step():
    assert Average("target", 0.9).at(5) == 0.9
    assert Average("target", lambda step: 1 - 1 / step).at(4) == 0.75


def test_stages_out_of_order_or_without_an_end_are_refused():
    with pytest.raises(ValueError, match=r"stages must start at 0 and then later and later; got \[0, 5, 5\]"):
        Schedule((Stage(), Stage(start=5), Stage(start=5)))
    with pytest.raises(ValueError, match="stage 1 never updates 'student', so it would not end"):
        Schedule((Stage(), Stage((("fake",),), start=5)))
