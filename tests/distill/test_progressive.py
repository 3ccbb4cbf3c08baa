"""Progressive distillation: the fixed point of a stage, and how one stage follows another."""

import pytest
import torch
from analytic import PROCESSES, Gaussian, Mixture, consistent, shifted
from analytic_team import loss_of, moment_at
from method_cases import team_of
from test_methods import run

from fewstep.distill.methods import Progressive
from fewstep.distill.solvers import DDIM
from fewstep.samplers import InputError


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("stage", "steps"), [(0, 4), (1, 2), (2, 1)])
def test_the_fixed_point_is_two_steps_of_the_teacher_in_one(name, stage, steps):
    """On every interval of the stage, to clean data in the last; and no other student has no loss."""
    process, method = PROCESSES[name], Progressive(teacher_steps=8)
    teacher = Mixture(process, (-1.0, 0.8), 0.4, (0.3, 0.7))
    points = torch.tensor(method.points(process), dtype=torch.float64)
    asked = []

    def end(t):
        index = (points[None] - t[:, None]).abs().nan_to_num(torch.inf).argmin(dim=1)
        assert torch.equal(points[index], t)
        asked.extend(index.tolist())
        return points[index - 8 // steps]

    def two_steps(x, t, s):
        middle = points[(torch.searchsorted(points, t) + torch.searchsorted(points, s)) // 2]
        return DDIM()(process, teacher, x, t, middle, s)

    student, x0 = consistent(process, two_steps, end), teacher.draw(32, 4)
    moment = moment_at(stage=stage, rows=32)
    value = loss_of(method, process, {"student": student, "teacher": teacher}, x0, moment=moment)
    assert set(asked) == set(range(8 // steps, 9, 8 // steps))
    assert value.max() < 1e-12
    wrong = shifted(student, process, 0.1)
    assert loss_of(method, process, {"student": wrong, "teacher": teacher}, x0, moment=moment).min() > 0.0099


def test_gaussian_data_need_no_more_steps_than_the_last_stage():
    """All stages at their fixed points, one after the other: one step of the last is the first teacher's eight."""
    process, method = PROCESSES["flow"], Progressive(teacher_steps=8)
    first = Gaussian(process, (0.3,), 0.7)
    points = torch.tensor(method.points(process), dtype=torch.float64)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    times = [point.repeat(5) for point in points.flip(0)]
    student = first
    for width in (2, 4, 8):

        def one_step(x, t, s, before=student, width=width):
            at = torch.searchsorted(points, t)
            return DDIM()(process, before, x, t, points[at - width // 2], points[at - width])

        def end(t, width=width):
            return points[torch.searchsorted(points, t) - width]

        student = consistent(process, one_step, end)
    once = DDIM()(process, student, x, times[0], times[-1])
    torch.testing.assert_close(once, DDIM()(process, first, x, *times))


def test_the_student_becomes_the_teacher_at_the_end_of_a_stage(tmp_path):
    """Also in a run that was cut right there; within a stage the teacher rests."""
    begun = team_of(Progressive(teacher_steps=8, final_steps=2, stage_steps=2), lora=True).state()
    states = [run("progressive", tmp_path / str(steps), steps).state() for steps in (2, 3)]
    run("progressive", tmp_path / "cut", 2)
    states.append(run("progressive", tmp_path / "cut", 4, resume_from_checkpoint="latest").state())
    names = [key.removeprefix("teacher/") for key in begun if key.startswith("teacher/")]
    changed = False
    for name in names:
        assert torch.equal(states[0][f"teacher/{name}"], begun[f"teacher/{name}"])
        for later in states[1:]:
            assert torch.equal(later[f"teacher/{name}"], states[0][f"student/{name}"])
        changed |= not torch.equal(states[1][f"student/{name}"], states[1][f"teacher/{name}"])
    assert changed


def test_its_stages_halve_the_steps_and_begin_anew():
    method = Progressive(teacher_steps=48, final_steps=3, stage_steps=10)
    schedule = method.turns()
    assert [(stage.start, stage.fresh) for stage in schedule.stages] == [
        (0, ()),
        (10, ("student",)),
        (20, ("student",)),
        (30, ("student",)),
    ]
    assert schedule.anneal_stages


def test_progressive_errors():
    for steps, final in ((48, 5), (4, 4), (48, 4)):
        words = f"teacher_steps must be final_steps times 2, 4, 8, ...; got {steps} and {final}"
        with pytest.raises(ValueError, match=words):
            Progressive(teacher_steps=steps, final_steps=final)
    with pytest.raises(InputError, match="the student was distilled to final_steps=2; got 4 steps"):
        Progressive(final_steps=2).plan(PROCESSES["vp"], 4)
