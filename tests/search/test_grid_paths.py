"""Grids from recorded trajectories: errors of steps by diffusers' own, paths by brute force, samples of a mixture."""

import itertools
from functools import partial

import pytest
import torch
from mixture import MixtureDenoiser, mixture_call, mixture_pipeline, mixture_scheduler
from tiny import call_arguments, tiny_dit, tiny_sd3, tiny_stable_diffusion

from fewstep.samplers import ExplicitGrid, InputError, Plan, Process, attach
from fewstep.samplers.call import CallHook
from fewstep.samplers.explicit import grid_adapter
from fewstep.samplers.recording import clean_samples, record
from fewstep.samplers.solver import scheduler_class
from fewstep.search.grid_paths import (
    Weighting,
    best_grids,
    local_errors,
    path_cost,
    shortest_path,
    suggest_grids,
)
from fewstep.search.trajectory import Trajectories, fine_times, record_trajectories

TIMES = (999.0, 900.0, 730.0, 500.0, 333.0, 120.0, 40.0, 7.0)
SIGMAS = ("karras", "exponential", "beta")


def plan_of(scheduler, **config):
    part = {"type": "diffusers", "scheduler": scheduler, "config": config}
    return Plan.from_json({"fewstep_plan": 1, "solver": part})


def samples(pipe, plan, numbers=range(1000, 1064)):
    return torch.cat(list(clean_samples(pipe, plan, [mixture_call(numbers)])))


def distance(one, other):
    return float((one - other).square().mean().sqrt())


def with_grid(plan, grid):
    return plan.model_copy(update={"grid": grid})


def spacing(steps, rule):
    return Plan.from_json({"fewstep_plan": 1, "grid": {"type": "spacing", "steps": steps, "spacing": rule}}).grid


class Kept(CallHook):
    def __init__(self):
        self.x, self.output = [], []

    def before_step(self, step):
        self.x.append(step.x)
        self.output.append(step.output)

    def after_step(self, step):
        self.end = step.x_next


@pytest.fixture(scope="module")
def teacher():
    """DPM-Solver++'s samples of the mixture in 250 steps."""
    pipe = mixture_pipeline()
    return pipe, samples(pipe, with_grid(plan_of("DPMSolverMultistepScheduler"), spacing(250, "trailing")))


# The mixture


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_mixture_predicts_its_own_score(prediction):
    """E[eps | x] = -sigma grad log p(x), by automatic differentiation of the density."""
    network, process = (
        MixtureDenoiser(prediction_type=prediction),
        Process.from_scheduler(mixture_scheduler(prediction)),
    )
    x = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for time in (0.0, 130.5, 999.0):
        alpha, sigma = float(process.alpha(time)), float(process.sigma(time))
        leaf = x.clone().requires_grad_()
        deviations = ((alpha * network.spreads) ** 2 + sigma**2).sqrt()
        parts = torch.distributions.Normal(alpha * network.means, deviations.view(-1, 1, 1, 1))
        density = parts.log_prob(leaf[:, None]).sum((2, 3, 4)) + network.weights.log()
        (score,) = torch.autograd.grad(density.logsumexp(1).sum(), leaf)
        predicted = process.to_eps(network(x, time).sample, x, time)
        torch.testing.assert_close(predicted, -sigma * score, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_of_the_mixture_do_not_depend_on_the_batch(dtype):
    pipe = mixture_pipeline(dtype)
    plan = with_grid(plan_of("DPMSolverMultistepScheduler"), spacing(5, "trailing"))
    with attach(pipe, plan):
        together, apart = pipe(**mixture_call([3, 4])).images, pipe(**mixture_call([4])).images
    torch.testing.assert_close(torch.from_numpy(together[1:]), torch.from_numpy(apart), rtol=0, atol=1e-6)


# Errors of steps


@pytest.mark.parametrize(
    ("scheduler", "order"),
    [
        ("DDIMScheduler", 1),
        ("EulerDiscreteScheduler", 1),
        ("DPMSolverMultistepScheduler", 2),
        ("UniPCMultistepScheduler", 2),
    ],
)
def test_errors_are_those_of_the_schedulers_own_steps(scheduler, order):
    """Each step is taken by diffusers from the stored states, and compared with the stored state where it lands."""
    pipe, plan = mixture_pipeline(), plan_of("DPMSolverMultistepScheduler")
    recorded = record_trajectories(pipe, plan, mixture_call, 6, fine=TIMES, batch_size=4)
    kept = Kept()
    record(pipe, with_grid(plan, ExplicitGrid(timesteps=TIMES)), mixture_call(range(6)), kept)
    truth, times = [*kept.x, kept.end], [*TIMES, recorded.process.clean_time]
    options = {"disable_corrector": [0]} if scheduler == "UniPCMultistepScheduler" else {}

    def error(*path):
        """Of where diffusers lands at the last of some places, after a step from each of the others."""
        own = scheduler_class(scheduler).from_config(pipe.scheduler.config, **options)
        adapter = grid_adapter(own, tuple(time for time in times[: len(TIMES)] if time in [times[at] for at in path]))
        adapter.set_timesteps(own.set_timesteps, "cpu")
        scale = Process.from_scheduler(own).scheduler_state_scale
        for step, place in enumerate(path[:-1]):
            x = kept.x[place] * scale(times[place])
            landed = adapter.step(own.step, kept.output[place], own.timesteps[step], x, {}).prev_sample
        return (landed / scale(times[path[-1]]) - truth[path[-1]]).square().mean()

    errors, near = local_errors(recorded, order), partial(torch.testing.assert_close, rtol=2e-4, atol=1e-10)
    for k, i, j in [(0, 1, 2), (0, 3, 7), (1, 2, 6), (4, 6, 7), (2, 3, 4)]:
        near(errors.second[k, i, j], error(k, i, j))
        near(errors.first[i, j], error(i, j))
    for i in (2, 5):
        near(errors.last[i], error(i, len(TIMES)))
        near(errors.start[i], (kept.x[0] - kept.x[i]).square().mean())


@pytest.mark.parametrize(
    ("make", "scheduler", "order"),
    [
        *itertools.product([tiny_dit, tiny_stable_diffusion], ["DDIMScheduler"], [1]),
        *itertools.product([tiny_dit, tiny_stable_diffusion], ["DPMSolverMultistepScheduler"], [2]),
        (tiny_sd3, "FlowMatchEulerDiscreteScheduler", 1),
    ],
)
def test_the_teachers_own_steps_have_no_error(make, scheduler, order):
    """With guidance too, in a doubled batch of which a sample counts once, and with flow matching."""
    pipe = make()
    recorded = record_trajectories(
        pipe,
        plan_of(scheduler),
        lambda numbers: call_arguments(pipe, len(numbers), numbers[0]),
        3,
        fine=8,
        batch_size=2,
    )
    errors, size = local_errors(recorded, order), recorded.gram.diagonal().mean()
    own = [errors.first[0, 1], errors.last[7], *(errors.second[i - 1, i, i + 1] for i in range(1, 7))]
    other = [errors.first[0, 3], errors.last[5], *(errors.second[i - 1, i, i + 2] for i in range(1, 6))]
    assert max(own) < 1e-9 * size < min(other)
    assert (recorded.n, recorded.rows) == (3, 3 * 8 * 2)


def test_fine_times_are_dense_where_time_and_where_noise_moves():
    process = Process.from_scheduler(mixture_scheduler())
    times = torch.tensor(fine_times(process, 40), dtype=torch.float64)
    assert (float(times[0]), float(times[-1])) == (999, 0)
    level = process.log_snr(times)
    places = (999 - times) / 999 + (level - level[0]) / (level[-1] - level[0])
    torch.testing.assert_close(places.diff(), torch.full((39,), 2 / 39, dtype=torch.float64), rtol=1e-2, atol=0)


# Paths


def random_trajectories(n, seed):
    draw = torch.Generator().manual_seed(seed)
    tensors = torch.randn(2 * n + 1, 30, generator=draw, dtype=torch.float64)
    process = Process.from_scheduler(mixture_scheduler())
    return Trajectories(fine_times(process, n), process, tensors @ tensors.T / 30, 1, 0)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("weighting", [Weighting(1, 1), Weighting(0, 2)])
def test_the_path_is_the_shortest_of_all(order, steps, weighting):
    for seed in range(3):
        recorded = random_trajectories(8, seed)
        errors, factors = local_errors(recorded, order), weighting.factors(recorded)
        starts = torch.tensor([True] * 8 if steps > 6 else [False, True, True] + [False] * 5)
        paths = [path for path in itertools.combinations(range(8), steps) if starts[path[0]]]
        costs = [path_cost(errors, factors, path, weighting.exponent) for path in paths]
        found = shortest_path(errors, factors, steps, weighting.exponent, starts)
        assert tuple(found) == paths[costs.index(min(costs))]


def test_weights_are_those_of_gaussian_data():
    """On Gaussian data of deviation s the ODE scales x - its mean by s / sqrt(alpha^2 s^2 + sigma^2) to the end."""
    recorded = random_trajectories(8, 0)
    size = recorded.gram[8, 8].sqrt()
    expected = size / (recorded.alpha**2 * size**2 + recorded.sigma**2).sqrt()
    torch.testing.assert_close(Weighting(1).factors(recorded), expected)
    torch.testing.assert_close(Weighting(0).factors(recorded), 1 / recorded.alpha)


# Samples


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_suggested_grids_are_nearer_to_the_teacher_than_all_built_in_ones(teacher, scheduler):
    pipe, truth = teacher
    plan = plan_of(scheduler)
    found = suggest_grids(pipe, plan, mixture_call, steps=5, n=32, fine=48, batch_size=32)
    assert found.rows == 32 * 48
    options = [{}] if scheduler == "DDIMScheduler" else [{}, *({f"use_{name}_sigmas": True} for name in SIGMAS)]
    built_in = [
        distance(samples(pipe, with_grid(plan_of(scheduler, **option), spacing(5, rule))), truth)
        for option in options
        for rule in ("leading", "linspace", "trailing")
    ]
    ours = [distance(samples(pipe, with_grid(plan, path.grid)), truth) for path in found.paths]
    assert min(ours) < 0.75 * min(built_in)
    assert sorted(ours)[len(ours) // 2] < min(built_in)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_the_best_of_a_small_space_is_among_the_suggested(teacher, scheduler):
    """All grids of 3 of 8 times, sampled."""
    pipe, truth = teacher
    plan = plan_of(scheduler)
    recorded = record_trajectories(pipe, plan, mixture_call, 32, fine=48, batch_size=32)
    coarse = coarsened(recorded, range(0, 48, 6))
    real = {
        times: distance(samples(pipe, with_grid(plan, ExplicitGrid(timesteps=times))), truth)
        for times in itertools.combinations(coarse.times, 3)
    }
    order = 1 if scheduler == "DDIMScheduler" else 2
    ours = [real[path.timesteps] for path in best_grids(coarse, 3, order)]
    assert min(ours) < 1.05 * min(real.values())
    assert max(ours) < sorted(real.values())[len(real) // 4]


def coarsened(recorded, places):
    """The same trajectories at some of the times."""
    n, kept = len(recorded.times), [*places]
    index = [*kept, n, *(n + 1 + place for place in kept)]
    times = tuple(recorded.times[place] for place in kept)
    return Trajectories(times, recorded.process, recorded.gram[index][:, index], recorded.n, recorded.rows)


# Errors


def test_bad_input_is_named(teacher):
    pipe, recorded = teacher[0], random_trajectories(8, 0)
    with pytest.raises(InputError, match=r"^a grid takes 1 to 8 of the fine times; got 9 steps$"):
        best_grids(recorded, 9, 1)
    with pytest.raises(InputError, match=r"^steps are judged by order 1 or 2; got 3$"):
        best_grids(recorded, 2, 3)
    with pytest.raises(InputError, match=r"^no fine time lies between 5 and 6, where a grid may begin$"):
        best_grids(recorded, 2, 1, first=(5, 6))
    with pytest.raises(InputError, match=r"^no grid of 8 steps begins where it may; give fewer steps, or more fine"):
        best_grids(recorded, 8, 1, first=(500, 0))
    with pytest.raises(InputError, match=r"^a fine trajectory has at least 2 times; got 1$"):
        record_trajectories(pipe, Plan(), mixture_call, 2, fine=1)
    with pytest.raises(InputError, match=r"^trajectories are recorded of at least 1 sample; got 0$"):
        record_trajectories(pipe, Plan(), mixture_call, 0)
    with pytest.raises(InputError, match=r"^grids cannot be suggested for LMSDiscreteScheduler; known: DDIMParallel"):
        suggest_grids(pipe, plan_of("LMSDiscreteScheduler"), mixture_call, steps=3)


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        ("DDPMScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_only_an_ode_of_one_evaluation_a_step_is_recorded(teacher, scheduler, config):
    before = vars(teacher[0]).copy()
    with pytest.raises(InputError, match=rf"^{scheduler}.* draws noise or evaluates the network between listed times;"):
        record_trajectories(teacher[0], plan_of(scheduler, **config), mixture_call, 2)
    assert vars(teacher[0]) == before


def test_a_pipeline_that_draws_noise_itself_is_recorded_with_a_solver_that_does_not():
    pipe = mixture_pipeline()
    stochastic = {"algorithm_type": "sde-dpmsolver++"}
    pipe.scheduler = scheduler_class("DPMSolverMultistepScheduler").from_config(pipe.scheduler.config, **stochastic)
    assert record_trajectories(pipe, plan_of("DDIMScheduler"), mixture_call, 2, fine=4).n == 2


def test_a_call_of_another_number_of_samples_is_named(teacher):
    with pytest.raises(InputError, match=r"^the call took 4 steps of 1 samples for 4 times and 2 numbers; give one"):
        record_trajectories(teacher[0], Plan(), lambda numbers: mixture_call(numbers[:1]), 2, fine=4)
