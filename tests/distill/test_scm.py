"""sCM: the tangent at the method's own times, weights and warm-up."""

import pytest
import torch
from analytic import MIXTURE, PROCESSES, Gaussian, Mixture, consistent
from analytic_team import loss_of, moment_at

from fewstep.distill.methods import SCM
from fewstep.distill.team import noise_like
from fewstep.distill.terms import Tangent
from fewstep.distill.times import LogNormalTimes, UniformTimes

any_process = pytest.mark.parametrize("name", PROCESSES)
LAWS = {"log-normal": LogNormalTimes(-0.3, 1.4), "uniform": UniformTimes()}


@any_process
@pytest.mark.parametrize("times", LAWS)
@pytest.mark.parametrize(("step", "warmup"), [(0, 0.0), (3, 0.3), (10, 1.0), (99, 1.0)])
def test_the_loss_is_the_size_of_the_normalised_tangent(name, times, step, warmup):
    """Of each sample alike, whatever its time: ||g||^2 / (||g|| + c)^2 per element."""
    process, teacher, student = PROCESSES[name], Mixture(PROCESSES[name], *MIXTURE), Gaussian(PROCESSES[name])
    method, x0 = SCM(warmup_steps=10, times=times), teacher.draw(8, 4)
    value = loss_of(method, process, {"student": student, "teacher": teacher}, x0, moment=moment_at(step))
    drawn = moment_at(step)
    t = LAWS[times](process, 8, drawn.generators)
    x_t = process.add_noise(x0, noise_like(x0, drawn), t)
    g = Tangent(process).direction(student, teacher(x_t, t), x_t, t, warmup=warmup)
    norm = g.norm(dim=1)
    torch.testing.assert_close(value, (norm / (norm + 0.1)) ** 2 / 4)


@any_process
def test_the_consistency_function_is_a_fixed_point(name):
    """The true map to clean data has almost no tangent, a teacher has."""
    process, teacher = PROCESSES[name], Mixture(PROCESSES[name], *MIXTURE)
    student = consistent(process, teacher.map, lambda t: torch.full_like(t, process.clean_time))
    losses = [
        loss_of(SCM(warmup_steps=0), process, {"student": one, "teacher": teacher}, teacher.draw(8, 4))
        for one in (student, teacher)
    ]
    assert losses[0].mean() < 0.01 * losses[1].mean()


def test_a_learned_variance_would_end_alike_at_all_times():
    """exp(-v) L + v is least at v = log L, and L is that of a tangent of one size."""
    process, teacher = PROCESSES["trig"], Mixture(PROCESSES["trig"], *MIXTURE)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x = process.add_noise(teacher.draw(3, 4), teacher.draw(3, 4, seed=1), t)
    size = Tangent(process, c=1e-9)(Gaussian(process), teacher(x, t), x, t)
    torch.testing.assert_close(size, size[:1].expand(3), rtol=1e-6, atol=0)
