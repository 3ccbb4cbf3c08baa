"""Grids as axes: valid and distinct whatever is drawn, without permutations, and invertible."""

import math
import random
import re
from itertools import pairwise

import optuna
import pytest
import torch
from diffusers import DDPMPipeline, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from tiny import tiny_qwen, tiny_scheduler, tiny_sd3, tiny_unet

from fewstep.samplers import DiffusersSolver, ExplicitGrid, InputError, Plan, RuleGrid, SpacingGrid, attach
from fewstep.search.axes.grid import GridAxis
from fewstep.search.axes.grid_index import GridIndexAxis
from fewstep.search.axes.steps import distinct, timesteps_of
from fewstep.search.space import Space, plan_key


def space_of(axis, steps=5, pipe=None):
    pipe = pipe or tiny_unet()
    base = Plan(grid=SpacingGrid(steps=steps))
    return Space(base, (axis.of(pipe, base),))


def drawn(space, count, seed=0):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    return [space.suggest(study.ask()) for _ in range(count)]


class TestDistinct:
    def test_by_hand(self):
        assert distinct([5, 5, 5], 0, 9) == (5, 4, 3)
        assert distinct([0, 0, 0], 0, 9) == (2, 1, 0)
        assert distinct([3, 12, 12], 0, 9) == (9, 8, 3)
        assert distinct([-4, 7, 1], 0, 9) == (7, 1, 0)
        assert distinct([1, 1, 1], 0, 2) == (2, 1, 0)
        assert distinct([], 0, 9) == ()

    def test_any_list_gives_a_grid_and_a_grid_stays(self):
        draw = random.Random(0)
        for _ in range(2000):
            high = draw.randint(0, 12)
            count = draw.randint(0, high + 1)
            chosen = [draw.randint(-3, high + 3) for _ in range(count)]
            found = distinct(chosen, 0, high)
            assert len(found) == count
            assert all(0 <= value <= high for value in found)
            assert all(before > after for before, after in pairwise(found))
            assert distinct(found, 0, high) == found
            assert distinct(draw.sample(chosen, count), 0, high) == found


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 12, 40])
@pytest.mark.parametrize("pipe", [tiny_unet, tiny_sd3])
class TestEveryGrid:
    @pytest.mark.parametrize("axis", [GridAxis, GridIndexAxis])
    def test_is_valid_and_comes_back(self, axis, pipe, steps):
        space = space_of(axis, steps, pipe())
        plans = drawn(space, 40)
        assert len({plan_key(plan) for plan in plans}) > 30
        for plan in plans:
            times = plan.grid.timesteps  # ExplicitGrid refuses what does not decrease
            assert len(times) == steps
            assert all(time == round(time) for time in times)
            assert space.plan(space.params(plan)) == plan

    def test_ends_are_in_their_ranges(self, pipe, steps):
        space = space_of(GridAxis, steps, pipe())
        axis = space.axes[0]
        for plan in drawn(space, 40):
            assert axis.first[0] - 1 <= plan.grid.timesteps[0] <= axis.first[1]
            assert steps == 1 or axis.last[0] <= plan.grid.timesteps[-1] <= axis.last[1] + 1

    def test_the_worst_parameters_give_grids(self, pipe, steps):
        space = space_of(GridAxis, steps, pipe())
        axis = space.axes[0]
        for first in axis.first:
            for last in axis.last:
                for share in (0.0, 1.0, 1e-300, math.nextafter(1.0, 0.0)):
                    params = {"grid.first": first, "grid.last": last}
                    params |= {f"grid.{index}": share for index in range(1, steps - 1)}
                    plan = space.plan(params)
                    assert space.plan(space.params(plan)) == plan


class TestGrid:
    def test_the_points_between_are_uniform(self):
        """Uniform parameters: the points between are sorted uniform ones, the i-th of m at i/(m + 1) on average."""
        space = space_of(GridAxis, 6)
        process = space.axes[0].process
        ends = torch.tensor([999.0, 10.0], dtype=torch.float64)
        noisy, clean = process.log_snr(ends).tolist()
        draw = random.Random(1)
        places = []
        for _ in range(800):
            params = {"grid.first": 999.0, "grid.last": 10.0} | {f"grid.{i}": draw.random() for i in range(1, 5)}
            times = torch.tensor(space.plan(params).grid.timesteps[1:-1], dtype=torch.float64)
            places.append((process.log_snr(times) - noisy) / (clean - noisy))
        mean, variance = torch.stack(places).mean(0), torch.stack(places).var(0)
        index = torch.arange(1, 5, dtype=torch.float64)
        assert torch.allclose(mean, index / 5, atol=0.03)
        assert torch.allclose(variance, index * (5 - index) / (25 * 6), atol=0.006)  # of the Beta(i, 5 - i) laws

    def test_even_in_log_snr(self):
        space = space_of(GridAxis, 4)
        params = {"grid.first": 900.0, "grid.last": 100.0, "grid.1": (2 / 3) ** 2, "grid.2": 1 / 2}
        times = torch.tensor(space.plan(params).grid.timesteps, dtype=torch.float64)
        gaps = space.axes[0].process.log_snr(times).diff()
        assert torch.allclose(gaps, gaps.mean().expand(3), atol=0.02)

    @pytest.mark.parametrize("pipe", [tiny_unet, tiny_sd3])
    @pytest.mark.parametrize("steps", [2, 3, 4, 5, 8, 10, 20])
    def test_grids_in_use_are_in_the_space(self, pipe, steps):
        pipe = pipe()
        space = space_of(GridAxis, steps, pipe)
        plans = [Plan(grid=SpacingGrid(steps=steps)), Plan(grid=RuleGrid(rule="trailing", steps=steps))]
        if pipe.scheduler.config.get("timestep_spacing"):
            solver = DiffusersSolver(scheduler="DPMSolverMultistepScheduler", config={"use_karras_sigmas": True})
            plans = [Plan(solver=solver, grid=SpacingGrid(steps=steps))]
            spacings = ("linspace", "trailing") if steps == 2 else ("leading", "linspace", "trailing")
            plans += [Plan(grid=SpacingGrid(steps=steps, spacing=spacing)) for spacing in spacings]
        for plan in plans:
            wanted = timesteps_of("grid", pipe, plan)
            made = space.plan(space.params(plan)).grid.timesteps
            assert made == pytest.approx(distinct(map(round, wanted), 0, 1000), abs=1.0)

    def test_zero_terminal_snr(self):
        space = space_of(GridAxis, 5, tiny_unet(scheduler=tiny_scheduler(rescale_betas_zero_snr=True)))
        grid = ExplicitGrid(timesteps=(999.0, 998.0, 997.0, 500.0, 100.0))
        assert space.plan(space.params(Plan(grid=grid))).grid == grid

    def test_a_coarser_resolution_keeps_the_noisiest_time(self):
        axis = space_of(GridAxis).axes[0]
        coarse = GridAxis(axis.pipe, axis.process, 5, axis.first, axis.last, resolution=10.0)
        for plan in drawn(Space(Plan(grid=SpacingGrid(steps=5)), (coarse,)), 20):
            assert all((999 - time) % 10 == 0 for time in plan.grid.timesteps)
        grid = ExplicitGrid(timesteps=(999.0, 749.0, 499.0, 249.0, 49.0))
        assert coarse.params(Plan(grid=grid))["grid.first"] == 999.0

    def test_edm_has_fractions_of_its_own_time(self):
        pipe = tiny_unet(DDPMPipeline, EDMEulerScheduler())
        space = space_of(GridAxis, 4, pipe)
        for plan in drawn(space, 10):
            assert space.plan(space.params(plan)) == plan
            with attach(pipe, plan):
                assert len(pipe.scheduler.timesteps) == 4

    def test_what_it_refuses(self):
        axis = space_of(GridAxis).axes[0]
        cases = [
            (Plan(grid=SpacingGrid(steps=4)), "the plan has 4 steps and the grid axis 5; give it as many"),
            (Plan(grid=ExplicitGrid(timesteps=(300, 200, 100, 50, 9))), "first timestep 300 is outside the range"),
            (Plan(grid=ExplicitGrid(timesteps=(999, 900, 800, 700, 600))), "last timestep 600 is outside the range"),
            (
                Plan(solver=DiffusersSolver(scheduler="HeunDiscreteScheduler"), grid=SpacingGrid(steps=5)),
                "HeunDiscreteScheduler evaluates the network 9 times in 5 steps; the grid axis needs a solver with one",
            ),
        ]
        for plan, words in cases:
            with pytest.raises(InputError, match=re.escape(words)):
                axis.params(plan)

    def test_ranges_it_refuses(self):
        axis = space_of(GridAxis).axes[0]
        with pytest.raises(
            InputError, match=re.escape("got last (0.0, 500.0) and first (400.0, 999.0) for times 0 to")
        ):
            GridAxis(axis.pipe, axis.process, 5, (400.0, 999.0), (0.0, 500.0))
        with pytest.raises(
            InputError, match="30 steps of resolution 10 do not fit between 400 and 200; give a smaller"
        ):
            GridAxis(axis.pipe, axis.process, 30, (400.0, 999.0), (0.0, 200.0), resolution=10.0)

    def test_pipelines_it_refuses(self):
        cases = [
            (tiny_unet(), DiffusersSolver(scheduler="DPMSolverMultistepScheduler", config={"use_karras_sigmas": True})),
            (tiny_sd3(scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True)), None),
            (tiny_qwen(), None),
        ]
        words = ["use_karras_sigmas=True makes a grid of its own", "time runs towards data on this scheduler", None]
        for (pipe, solver), expected in zip(cases, words, strict=True):
            base = Plan(solver=solver, grid=SpacingGrid(steps=5))
            if expected is None:
                axis = GridAxis.of(pipe, base)
                with pytest.raises(
                    InputError, match="the timesteps of a scheduler that shifts by resolution; list them"
                ):
                    axis.params(base)
            else:
                with pytest.raises(InputError, match=expected):
                    GridAxis.of(pipe, base)


class TestGridIndex:
    def test_order_does_not_matter(self):
        space = space_of(GridIndexAxis)
        numbers = [3, 999, 500, 500, 0]
        plans = set()
        for seed in range(10):
            order = random.Random(seed).sample(numbers, 5)
            plans.add(plan_key(space.plan({f"grid-index.{index}": value for index, value in enumerate(order)})))
        assert len(plans) == 1
        params = {f"grid-index.{index}": value for index, value in enumerate(numbers)}
        assert space.plan(params).grid == ExplicitGrid(timesteps=(999.0, 500.0, 499.0, 3.0, 0.0))

    def test_flow_times_are_one_more(self):
        space = space_of(GridIndexAxis, 2, tiny_sd3())
        plan = space.plan({"grid-index.0": 0, "grid-index.1": 999})
        assert plan.grid == ExplicitGrid(timesteps=(1000.0, 1.0))
        assert space.params(plan) == {"grid-index.0": 999, "grid-index.1": 0}

    def test_what_it_refuses(self):
        axis = space_of(GridIndexAxis).axes[0]
        with pytest.raises(InputError, match="the plan has 4 steps and the grid-index axis 5; give it as many"):
            axis.params(Plan(grid=SpacingGrid(steps=4)))
        with pytest.raises(InputError, match="1001 distinct steps of 1000 train steps are too many"):
            GridIndexAxis.of(tiny_sd3(), Plan(grid=SpacingGrid(steps=1001)))
        with pytest.raises(InputError, match="the grid-index part moves times that count train steps"):
            GridIndexAxis.of(tiny_unet(DDPMPipeline, EDMEulerScheduler()), Plan(grid=SpacingGrid(steps=4)))
