"""Regression and the critic: what each minimises, in closed form, and whom the gradient reaches."""

import pytest
import torch
from analytic import FLOW, MIXTURE, PROCESSES, VP, Gaussian, Mixture, Scaled, column, middle, noisy, shifted

from fewstep.distill.jumps import Landing
from fewstep.distill.predict import Prediction
from fewstep.distill.solvers import DDIM
from fewstep.distill.terms import DSM, Regression, progressive_goal, truncated_snr
from fewstep.samplers import InputError

any_process = pytest.mark.parametrize("name", PROCESSES)
WIDTHS = {"vp": 50, "flow": 50, "trig": 0.05, "edm": 0.05}


@any_process
def test_progressive_goal_is_where_two_steps_lead(name):
    """One DDIM step of the goal lands where the teacher's two do, also on clean data; a step of itself gives itself."""
    process, t = PROCESSES[name], middle(name)
    teacher = Mixture(process, *MIXTURE)
    halfway, end = t - WIDTHS[name], t - 2 * WIDTHS[name]
    end[0] = process.clean_time
    x_t = noisy(process, t)
    x_s = DDIM()(process, teacher, x_t, t, halfway, end)
    goal = progressive_goal(process, x_t, t, x_s, end)
    torch.testing.assert_close(Landing()(process, x_t, t, end, goal), x_s)
    torch.testing.assert_close(process.add_noise(goal.x0, goal.eps, t), x_t)
    own = progressive_goal(process, x_t, t, DDIM()(process, teacher, x_t, t, end), end)
    for got, wanted in zip(own, teacher(x_t, t), strict=True):
        torch.testing.assert_close(got, wanted)


@any_process
@pytest.mark.parametrize("quantity", ["sample", "epsilon", "v_prediction", "flow_prediction"])
def test_regression_is_the_distance_of_one_quantity(name, quantity):
    """Against the process's own conversions; zero at the goal, and the weight is the process's."""
    process, t = PROCESSES[name], middle(name)
    x = noisy(process, t)
    teacher, student = Mixture(process, *MIXTURE), Gaussian(process)
    goal = teacher(x, t)
    outs = [process.convert(process.from_x0(pair.x0, x, t), x, t, quantity) for pair in (goal, student(x, t))]
    wanted = (outs[0] - outs[1]).square().mean(dim=1)
    torch.testing.assert_close(Regression(process, quantity)(student, x, t, goal), wanted)
    assert Regression(process, quantity)(teacher, x, t, goal).max() == 0
    weighted = Regression(process, quantity, weight=truncated_snr)(student, x, t, goal)
    torch.testing.assert_close(weighted, wanted * process.snr(t).clamp(min=1))


def test_reflow_of_pairs_learns_the_mean_velocity():
    """Independent pairs: the minimiser is E[eps - x0 | x_t], the flow itself."""
    teacher = Gaussian(FLOW)
    t = torch.full((20000,), 600.0, dtype=torch.float64)
    x0, noise = teacher.draw(20000, 1), torch.randn(20000, 1, generator=torch.Generator().manual_seed(3)).double()
    x_t, term = FLOW.add_noise(x0, noise, t), Regression(FLOW, "flow_prediction")
    best = term(teacher, x_t, t, Prediction(x0, noise)).mean()
    for by in (-0.1, 0.1):
        assert term(shifted(teacher, FLOW, by), x_t, t, Prediction(x0, noise)).mean() > best + 0.005


def test_regression_teaches_the_student_alone():
    student, teacher, t = Scaled(Gaussian(VP)), Scaled(Mixture(VP, *MIXTURE)), middle("vp")
    x = noisy(VP, t)
    Regression(VP)(student, x, t, teacher(x, t)).sum().backward()
    assert student.weight.grad.abs() > 0
    assert teacher.weight.grad is None


def test_regression_errors():
    with pytest.raises(InputError, match=r"unknown prediction type 'x0'; known: epsilon, flow_prediction"):
        Regression(VP, "x0")
    t = torch.tensor([500.0])
    with pytest.raises(InputError, match=r"tensors of one shape; got \(1, 3\) and \(1, 4\)"):
        Regression(VP)(Gaussian(VP), torch.zeros(1, 3), t, Prediction(torch.zeros(1, 4), torch.zeros(1, 4)))


class AffineCritic:
    """x0 = numbers[0] x + numbers[1]."""

    def __init__(self, process, numbers):
        self.process, self.numbers = process, numbers

    def __call__(self, x, t):
        x0 = self.numbers[0] * x + self.numbers[1]
        return Prediction(x0, (x - column(self.process.alpha(t), x) * x0) / column(self.process.sigma(t), x))


@pytest.mark.parametrize("quantity", ["sample", "epsilon"])
@pytest.mark.parametrize("name", ["vp", "flow"])
def test_the_critic_learns_the_posterior_mean(name, quantity):
    """The loss of an affine critic is quadratic: one Newton step finds its minimum, the Gaussian posterior mean."""
    process = PROCESSES[name]
    teacher, term = Gaussian(process), DSM(Regression(process, quantity))
    t = torch.full((100000,), 500.0, dtype=torch.float64)
    x, noise = teacher.draw(100000, 1), torch.randn(100000, 1, generator=torch.Generator().manual_seed(3)).double()

    def loss(numbers):
        return term(AffineCritic(process, numbers), x, noise, t).mean()

    start = torch.zeros(2, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(loss, start)
    numbers = torch.linalg.solve(torch.autograd.functional.hessian(loss, start), -gradient)
    x_t = torch.linspace(-1, 2, 7, dtype=torch.float64)[:, None]
    learned = AffineCritic(process, numbers)(x_t, t[:7])
    torch.testing.assert_close(learned.x0, teacher(x_t, t[:7]).x0, rtol=0, atol=0.01)


def test_the_critic_does_not_teach_the_student():
    x = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    critic = Scaled(Gaussian(VP))
    DSM(Regression(VP, "epsilon"))(critic, x, torch.ones(3, 4).double(), middle("vp")).sum().backward()
    assert critic.weight.grad.abs() > 0
    assert x.grad is None
