"""The tangent of sCM: zero at the consistency function, the derivative of the map everywhere."""

import pytest
import torch
from analytic import FLOW, MIXTURE, PROCESSES, TRIG, Gaussian, Mixture, column, consistent, middle, noisy, shifted

from fewstep.distill.predict import Prediction
from fewstep.distill.terms import Tangent, circle_velocity
from fewstep.samplers import InputError

any_process = pytest.mark.parametrize("name", PROCESSES)


@any_process
def test_circle_velocity_is_trigflows(name):
    """On TrigFlow it is the v prediction at the same state; on others that of the same law."""
    teacher, same = Mixture(PROCESSES[name], *MIXTURE), Mixture(TRIG, *MIXTURE)
    angle = torch.tensor([0.3, 0.8, 1.3], dtype=torch.float64)
    z = noisy(TRIG, angle * 2 / torch.pi)
    wanted = circle_velocity(TRIG, same)(z, angle)
    x0, eps = same(z, angle * 2 / torch.pi)
    torch.testing.assert_close(wanted, column(angle.cos(), z) * eps - column(angle.sin(), z) * x0)
    torch.testing.assert_close(circle_velocity(teacher.process, teacher)(z, angle), wanted, rtol=1e-6, atol=1e-6)


@any_process
def test_the_tangent_vanishes_at_the_consistency_function(name):
    """df/da = 0 along the teacher's path, to the square of the step; elsewhere it does not."""
    process, t = PROCESSES[name], middle(name)
    teacher = Mixture(process, *MIXTURE)
    student = consistent(process, teacher.map, lambda t: torch.full_like(t, process.clean_time))
    x = noisy(process, t)
    sizes = [Tangent(process, step).direction(student, teacher(x, t), x, t).abs().max() for step in (0.04, 0.02)]
    assert sizes[1] < 2e-3
    if name != "vp":  # whose levels have corners at the times of the table
        assert float(sizes[0] / sizes[1]) == pytest.approx(4, rel=0.15)
    for wrong in (lambda x, t: shifted(student, process, 0.2 * process.log_snr(t))(x, t), teacher):
        assert Tangent(process).direction(wrong, teacher(x, t), x, t).abs().amax(dim=1).min() > 5e-3


def test_the_tangent_is_the_derivative_of_the_map():
    """g = cos(a) df/da for any student, by differentiating along the path."""
    student, teacher, t = Gaussian(TRIG, (0.3,), 0.9), Mixture(TRIG, *MIXTURE), middle("trig")
    x, angle = noisy(TRIG, t), t * torch.pi / 2
    along = circle_velocity(TRIG, teacher)(x, angle)

    def f(way):
        a, z = angle + way, x + way * along
        return column(a.cos(), z) * z - column(a.sin(), z) * circle_velocity(TRIG, student)(z, a)

    here = torch.zeros((), dtype=torch.float64)
    slope = torch.autograd.functional.jvp(f, here, torch.ones_like(here))[1]
    g = Tangent(TRIG, 1e-3).direction(student, teacher(x, t), x, t)
    torch.testing.assert_close(g, column(angle.cos(), x) * slope, rtol=1e-4, atol=1e-5)


def test_without_warm_up_the_tangent_is_the_teachers_velocity():
    """warmup 0 leaves -cos^2 (F - dz/da): plain distillation of the velocity."""
    student, teacher, t = Gaussian(FLOW), Mixture(FLOW, *MIXTURE), middle("flow")
    x = noisy(FLOW, t)
    angle = torch.atan2(FLOW.sigma(t), FLOW.alpha(t))
    z = x / column(torch.hypot(FLOW.alpha(t), FLOW.sigma(t)), x)
    gap = circle_velocity(FLOW, student)(z, angle) - circle_velocity(FLOW, teacher)(z, angle)
    g = Tangent(FLOW).direction(student, teacher(x, t), x, t, warmup=0.0)
    torch.testing.assert_close(g, -column(angle.cos() ** 2, x) * gap)


def test_the_gradient_of_the_loss_is_minus_the_normalised_tangent():
    """By the student's F: -2 g / (||g|| + c) / D; by a log-variance v: 1 - exp(-v) loss."""
    t = middle("trig")
    x, path = noisy(TRIG, t), Mixture(TRIG, *MIXTURE)(noisy(TRIG, t), t)
    shift = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)  # moves F by itself, and x0 and eps with it

    def student(x, t):
        x0, eps = Gaussian(TRIG)(x, t)
        return Prediction(x0 - column(TRIG.sigma(t), x) * shift, eps + column(TRIG.alpha(t), x) * shift)

    term, v = Tangent(TRIG), torch.tensor([0.3, -0.2, 0.0], dtype=torch.float64, requires_grad=True)
    plain = term(student, path, x, t)
    g = term.direction(student, path, x, t)
    g = g / (g.norm(dim=1, keepdim=True) + 0.1)
    torch.testing.assert_close(plain.detach(), g.square().mean(dim=1))
    plain.sum().backward()
    torch.testing.assert_close(shift.grad, -2 * g / 4)
    term(student, path, x, t, log_variance=v).sum().backward()
    torch.testing.assert_close(v.grad, 1 - plain.detach() * (-v.detach()).exp())


@any_process
def test_the_tangent_is_finite_at_both_ends(name):
    """Noise alone and almost none: no network is asked for clean data, and no value is infinite."""
    process = PROCESSES[name]
    inner = Gaussian(process)

    def student(x, t):
        assert (process.sigma(t) > 0).all()
        return inner(x, t)

    t = process.from_uniform(torch.tensor([1e-6, 1.0], dtype=torch.float64))
    x = noisy(process, t)
    assert Tangent(process)(student, inner(x, t), x, t).isfinite().all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Tangent(TRIG, step=0.2), r"step of the tangent must be above 0 and below 0.1; got 0.2"),
        (lambda: Tangent(TRIG, c=0.0), r"c of the tangent must be positive; got 0.0"),
    ],
)
def test_errors(make, words):
    with pytest.raises(InputError, match=words):
        make()
