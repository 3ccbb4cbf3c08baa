"""Score gaps: the gradients are the differences of true scores, and of true divergences."""

import numpy as np
import pytest
import torch
from analytic import EDM, MIDDLE, MIXTURE, PROCESSES, VP, Gaussian, Mixture, Scaled, column, middle

from fewstep.distill.predict import Prediction
from fewstep.distill.terms import DMD, SIM, VSD, SiD
from fewstep.samplers import InputError

any_process = pytest.mark.parametrize("name", PROCESSES)


@any_process
@pytest.mark.parametrize("term", [VSD, DMD])
@pytest.mark.parametrize("law", [Gaussian, Mixture])
def test_gradients_are_the_difference_of_the_scores(name, term, law):
    """VSD: sigma^3 (score_fake - score_teacher). DMD: sigma^2 / alpha of it, over mean |x - R|. By differentiation."""
    process, t = PROCESSES[name], middle(name)
    teacher = Gaussian(process, (-0.4,), 0.9) if law is Gaussian else Mixture(process, *MIXTURE)
    fake = Gaussian(process)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = term(process)(teacher, fake, x, noise, t)
    assert loss.shape == (3,)
    loss.sum().backward()
    x_t = process.add_noise(x.detach(), noise, t)
    gap = fake.score(x_t, t) - teacher.score(x_t, t)
    alpha, sigma = column(process.alpha(t), x), column(process.sigma(t), x)
    error = (x.detach() - teacher(x_t, t).x0).abs().mean(dim=1, keepdim=True)
    wanted = sigma**3 * gap if term is VSD else sigma**2 / alpha * gap / error
    torch.testing.assert_close(x.grad, wanted / 4)
    x.grad = None
    term(process)(teacher, teacher, x, noise, t).sum().backward()
    assert x.grad.abs().max() == 0


def quadrature(count=24):
    """Nodes and weights of E over two standard normal numbers."""
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(count))
    mass = torch.cartesian_prod(weights, weights).prod(dim=1)
    return torch.cartesian_prod(nodes, nodes), mass / mass.sum()


@any_process
def test_sim_follows_the_divergence_of_two_gaussians(name):
    """The expected gradient by the student's mean m is that of E sqrt(y^2 + c^2), y the gap in units of noise.

    For equal variances y = sigma alpha (m - mean) / (alpha^2 std^2 + sigma^2) everywhere: its derivative is exact.
    """
    process, c = PROCESSES[name], 0.05
    teacher, fake = Gaussian(process, (0.7,), 0.5), Gaussian(process, (0.2,), 0.5)
    grid, mass = quadrature()
    for time in MIDDLE[name]:
        t = torch.full((len(grid),), time, dtype=torch.float64)
        mean = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        loss = SIM(process, c=c)(teacher, fake, mean + 0.5 * grid[:, :1], grid[:, 1:], t)
        (loss * mass).sum().backward()
        alpha, sigma = process.alpha(time), process.sigma(time)
        rate = sigma * alpha / (alpha**2 * 0.25 + sigma**2)
        y = rate * (0.2 - 0.7)
        torch.testing.assert_close(mean.grad, y / (y**2 + c**2).sqrt() * rate)


@any_process
def test_sid_is_the_fisher_divergence_in_the_mean(name):
    """E (R - F)(R - x) = E (R - F)^2, as F is the posterior mean of x: the loss is (1 - a) E (R - F)^2 / |x - R|."""
    process = PROCESSES[name]
    teacher, fake = Gaussian(process, (0.7,), 0.5), Gaussian(process, (0.2,), 0.8)
    grid, mass = quadrature()
    x, t = 0.2 + 0.8 * grid[:, :1], torch.full((len(grid),), MIDDLE[name][1], dtype=torch.float64)
    x_t = process.add_noise(x, grid[:, 1:], t)
    real, made = teacher(x_t, t).x0, fake(x_t, t).x0
    scale = (x - real).abs()[:, 0]
    for a in (0.0, 0.5, 1.2):
        loss = SiD(process, a)(teacher, fake, x, grid[:, 1:], t)
        wanted = (1 - a) * (mass * (real - made)[:, 0] ** 2).sum()
        torch.testing.assert_close((mass * loss * scale).sum(), wanted)


@pytest.mark.parametrize("term", [VSD(VP), DMD(VP), SIM(VP), SiD(VP)], ids=lambda term: type(term).__name__)
def test_score_gaps_teach_the_student_and_are_finite(term):
    """In half precision too; VSD and DMD ask both networks without gradient."""
    teacher, fake = Scaled(Mixture(VP, *MIXTURE)), Scaled(Gaussian(VP))
    x = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    loss = term(teacher, fake, x, torch.ones(3, 4, dtype=torch.bfloat16), middle("vp"))
    assert loss.requires_grad
    assert loss.dtype in (torch.float32, torch.float64)
    loss.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0
    if isinstance(term, VSD | DMD):
        assert teacher.weight.grad is None
        assert fake.weight.grad is None


def test_a_sample_the_teacher_agrees_with_has_no_gradient():
    """mean |x - R| = 0 gives 0/0 in DMD, which is dropped."""
    x = torch.full((3, 4), 0.5, dtype=torch.float64)

    def sure(x_t, t):
        return Prediction(x, x_t)

    assert DMD(VP).gradient(sure, sure, x, torch.ones_like(x), middle("vp")).abs().max() == 0


def test_errors():
    with pytest.raises(InputError, match=r"c of score implicit matching must be positive; got 0.0"):
        SIM(EDM, c=0.0)
