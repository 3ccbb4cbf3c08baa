"""Reflow and its distillation: fixed points on the coupling of an exact teacher."""

import pytest
import torch
from analytic import PROCESSES, Gaussian, column, shifted
from analytic_team import loss_of

from fewstep.distill.jumps import Landing
from fewstep.distill.methods import InstaFlow, Reflow
from fewstep.distill.predict import Prediction
from fewstep.samplers import InputError

any_process = pytest.mark.parametrize("name", PROCESSES)
MEAN, STD = 0.3, 0.7


def coupling(process):
    """Where an exact teacher takes states of the noisiest time."""
    teacher = Gaussian(process, (MEAN,), STD)
    ends = [torch.full((16,), time, dtype=torch.float64) for time in (process.time_range.noisiest, process.clean_time)]
    (alpha, variance) = teacher._at(torch.zeros(16, 4).double(), ends[0])
    noise = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = alpha * MEAN + variance.sqrt() * noise
    return ends, start, teacher.map(start, *ends)


def straight(process):
    """The student that knows the straight path through each state: on it x0 and eps are linear in each other."""
    end = torch.tensor([process.time_range.noisiest], dtype=torch.float64)
    a, b = process.alpha(end), process.sigma(end)
    spread = ((a * STD) ** 2 + b**2).sqrt()

    def denoise(x, t):
        # unit u: x0 = MEAN + STD u, start = a MEAN + spread u, eps = (start - a x0) / b
        alpha, sigma = column(process.alpha(t), x), column(process.sigma(t), x)
        slope = (spread - a * STD) / b
        u = (x - alpha * MEAN) / (alpha * STD + sigma * slope)
        return Prediction(MEAN + STD * u, slope * u)

    return denoise


@any_process
@pytest.mark.parametrize("times", ["uniform", "logit-normal"])
def test_reflow_straightens_the_coupling(name, times):
    """Its fixed point has no loss at any time, and takes each start in one step to where the teacher did."""
    process, student = PROCESSES[name], straight(PROCESSES[name])
    ends, start, x0 = coupling(process)
    method = Reflow(times=times)
    assert loss_of(method, process, {"student": student}, x0, start=start).max() < 1e-12
    assert loss_of(method, process, {"student": shifted(student, process, 0.1)}, x0, start=start).min() > 0.0099
    assert loss_of(method, process, {"student": Gaussian(process, (MEAN,), STD)}, x0, start=start).mean() > 1e-3
    torch.testing.assert_close(Landing()(process, start, *ends, student(start, ends[0])), x0)


@any_process
def test_instaflow_asks_at_the_start_alone(name):
    process, asked = PROCESSES[name], []
    _, start, x0 = coupling(process)

    def student(x, t):
        asked.append((x, t))
        return Prediction(x0 + 0.5, x0)

    value = loss_of(InstaFlow(), process, {"student": student}, x0, start=start)
    torch.testing.assert_close(value, torch.full_like(value, 0.25))
    ((x, t),) = asked
    assert torch.equal(x, start)
    assert (t == process.time_range.noisiest).all()
    assert loss_of(InstaFlow(), process, {"student": straight(process)}, x0, start=start).max() < 1e-12


def test_instaflow_has_one_step():
    with pytest.raises(InputError, match="the student was trained for 1 step; got 2, use reflow for more"):
        InstaFlow().plan(PROCESSES["flow"], 2)


def test_reflow_is_deployed_evenly_in_any_number_of_steps():
    plans = [Reflow().plan(PROCESSES["vp"], steps).grid.timesteps for steps in (1, 2, 4)]
    assert plans == [(999.0,), (999.0, 499.0), (999.0, 749.0, 499.0, 249.0)]
    with pytest.raises(InputError, match="steps must be at least 1; got 0"):
        Reflow().plan(PROCESSES["flow"], 0)
