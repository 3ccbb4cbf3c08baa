"""The student's own sampling: gradients against autograd by hand, and the noise that pipelines start from."""

from dataclasses import replace

import pytest
import torch
from analytic import EDM, FLOW, PROCESSES, VP
from diffusers import DDIMScheduler, EDMEulerScheduler
from method_cases import TinySource
from test_methods import moment_of

from fewstep.distill.predict import Prediction
from fewstep.distill.rollout import Rollout, check_start, start
from fewstep.samplers import InputError, Process

TIMES = (999.0, 600.0, 200.0)


def networks():
    """A student of two numbers, and its calls."""
    weight = torch.tensor([0.5, -0.2], dtype=torch.float64, requires_grad=True)
    calls = []

    def student(x, t):
        calls.append((x, t))
        x0 = torch.tanh(weight[0] * x + weight[1])
        alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
        return Prediction(x0, (x - alpha * x0) / sigma)

    return weight, student, calls


def draws(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(2, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("gradient", ["none", "last", "all"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_rollouts_are_the_loop_by_hand(fresh, gradient, checkpointed):
    x = draws(0)()
    weight, student, _ = networks()
    noise, state = draws(1), x
    for index, time in enumerate(TIMES):
        x0, eps = student(state, torch.full((2,), time))
        if index < 2:
            state = VP.alpha(TIMES[index + 1]) * x0 + VP.sigma(TIMES[index + 1]) * (noise() if fresh else eps)
            state = state.detach() if gradient == "last" else state
    wanted = torch.autograd.grad(x0.square().sum(), weight)[0]

    weight, student, calls = networks()
    rolled = Rollout(VP, TIMES, fresh, checkpointed)(student, x, draws(1), gradient)
    torch.testing.assert_close(rolled, x0)
    assert [float(t[0]) for _, t in calls] == list(TIMES)
    assert rolled.requires_grad == (gradient != "none")
    if gradient != "none":
        rolled.square().sum().backward()
        torch.testing.assert_close(weight.grad, wanted)
        recomputed = {"last": 1, "all": 3}[gradient] if checkpointed else 0
        assert len(calls) == 3 + recomputed


def test_pipelines_start_from_this_noise():
    condition = TinySource().batch(0, range(3)).condition
    unit = start(VP, condition, moment_of(("student",)))
    assert unit.shape == (3, *condition.layout.shape)
    scheduler = EDMEulerScheduler()
    edm = start(Process.from_scheduler(scheduler), condition, moment_of(("student",)))
    torch.testing.assert_close(edm, unit * float(scheduler.init_noise_sigma))
    torch.testing.assert_close(start(FLOW, condition, moment_of(("student",))), unit)


def test_first_times_that_no_pipeline_starts_at_are_refused():
    check_start(Process.from_scheduler(DDIMScheduler()), 399.0)
    for process in PROCESSES.values():
        check_start(process, process.time_range.noisiest)
    with pytest.raises(
        InputError, match="the first time is 600, but pipelines of this process start from the noise of"
    ):
        check_start(FLOW, 600.0)
    with pytest.raises(InputError, match="the first time is 0, but pipelines"):
        check_start(EDM, 0.0)
    with pytest.raises(InputError, match="a rollout needs at least one time; got none"):
        replace(Rollout(VP, TIMES), times=())
