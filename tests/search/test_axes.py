"""Every axis of the space, on pipelines of several families: what it draws runs, and its parameters come back."""

import re
from functools import cache

import numpy as np
import optuna
import pytest
import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler
from tiny import (
    call_arguments,
    tiny_dit,
    tiny_qwen,
    tiny_scheduler,
    tiny_sd3,
    tiny_stable_diffusion,
    tiny_unet,
    tiny_wan,
)

import fewstep.search.axes  # noqa: F401  registers them
from fewstep.samplers import (
    Aligner,
    AnalyticInit,
    BlockMask,
    ConstantGuidance,
    DiffusersSolver,
    EpsilonScaling,
    ExplicitGrid,
    GuidanceSchedule,
    InputError,
    ModelSwitch,
    Plan,
    SpacingGrid,
    StartStatistics,
    TimeShift,
    UNetDeep,
    attach,
    uniform_mask,
)
from fewstep.search.axes.cache import Rhythm
from fewstep.search.axes.correction import CorrectionAxis
from fewstep.search.axes.guidance import GuidanceAxis
from fewstep.search.axes.models import ModelsAxis
from fewstep.search.axes.solver import FLOW, VARIANCE_PRESERVING, SolverAxis
from fewstep.search.space import AXES, Space, plan_key

GRID = ExplicitGrid(timesteps=(950.0, 720.0, 410.0, 150.0))
PLAIN = Plan(grid=GRID)
STARTED = PLAIN.model_copy(update={"start": AnalyticInit()})
SWITCHED = PLAIN.model_copy(update={"models": ModelSwitch(networks=("self", "other"), steps=(2,))})
PIPES = {
    "unet": tiny_unet,
    "dit": lambda: tiny_dit(layers=2),
    "stable-diffusion": tiny_stable_diffusion,
    "sd3": tiny_sd3,
    "wan": tiny_wan,
    "qwen": tiny_qwen,
}
MADE = ("cache", "conditioning", "correction", "grid", "grid-index", "guidance", "guidance-scale", "solver")
CASES = [
    *((axis, pipe, PLAIN) for axis in MADE for pipe in ("dit", "stable-diffusion", "sd3", "wan")),
    *((axis, "unet", PLAIN) for axis in MADE if not axis.startswith("guidance")),
    *((axis, "qwen", PLAIN) for axis in ("guidance", "guidance-scale", "grid", "solver")),
    *(("start", pipe, STARTED) for pipe in ("unet", "dit", "sd3")),
    *(("models", pipe, SWITCHED) for pipe in ("unet", "dit", "sd3")),
]


@cache
def pipeline(name):
    return PIPES[name]()


def drawn(space, count, seed=0):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    for _ in range(count):
        trial = study.ask()
        yield trial, space.suggest(trial)


def resources(pipe):
    mean = torch.zeros(1, 8, 8) if type(pipe).__name__ == "DDIMPipeline" else torch.zeros(4, *_size(pipe))
    other = next(pipe.components[name] for name in ("unet", "transformer") if name in pipe.components)
    return {"start_statistics": StartStatistics(mean, 0.5, 2), "other": other}


def _size(pipe):
    return (4, 4) if type(pipe).__name__ == "DiTPipeline" else (8, 8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("axis", "pipe", "base"), CASES, ids=[f"{axis}-{pipe}" for axis, pipe, _ in CASES])
class TestEveryAxis:
    def test_what_it_draws_runs(self, axis, pipe, base):
        pipe = pipeline(pipe)
        space = Space.of(pipe, base, [axis])
        for _, plan in drawn(space, 3):
            assert Plan.from_json(plan.to_json()) == plan
            with attach(pipe, plan, resources=resources(pipe)) as attached:
                output = pipe(**call_arguments(pipe, batch=1))
            assert len(attached.stats.steps) == 4
            samples = output.frames if hasattr(output, "frames") else output.images
            assert np.isfinite(np.asarray(samples)).all()

    def test_parameters_come_back(self, axis, pipe, base):
        space = Space.of(pipeline(pipe), base, [axis])
        for trial, plan in drawn(space, 25, seed=1):
            params = space.params(plan)
            assert list(params) == list(trial.params)
            assert all(name.startswith(f"{axis}.") or axis == "guidance-scale" for name in params)
            for name, value in params.items():
                distribution = trial.distributions[name]
                assert distribution._contains(distribution.to_internal_repr(value))
            again = space.plan(params)
            assert plan_key(again) == plan_key(plan)
            assert again == plan

    def test_only_its_own_part_changes(self, axis, pipe, base):
        space = Space.of(pipeline(pipe), base, [axis])
        field = {"grid-index": "grid", "guidance-scale": "guidance", "cache": "caches"}.get(axis, axis)
        plans = [plan for _, plan in drawn(space, 12, seed=2)]
        assert len({plan_key(plan) for plan in plans}) > 1
        for plan in plans:
            assert plan.model_copy(update={field: getattr(base, field)}) == base


def test_every_axis_is_tested():
    elsewhere = {"layers", "layer-list"}  # test_axis_layers
    assert set(AXES.names()) - elsewhere == {axis for axis, *_ in CASES}


def test_axes_join_in_one_space():
    pipe = pipeline("dit")
    space = Space.of(pipe, PLAIN, ["solver", "grid", "guidance", "conditioning", "correction", "cache"])
    for _, plan in drawn(space, 4):
        assert space.plan(space.params(plan)) == plan
        with attach(pipe, plan):
            pipe(**call_arguments(pipe, batch=1))


@pytest.mark.parametrize(
    ("axis", "pipe", "base", "words"),
    [
        ("grid", "dit", Plan(), "the grid axis needs to know the number of steps; give the plan a grid part"),
        ("grid-index", "dit", Plan(), "the grid-index axis needs to know the number of steps"),
        ("conditioning", "dit", Plan(), "the conditioning axis needs to know the number of steps"),
        ("guidance", "dit", Plan(), "the guidance axis needs to know the number of steps"),
        ("guidance", "unet", PLAIN, "DDIMPipeline takes no guidance_scale; leave the guidance axis out"),
        ("start", "unet", PLAIN, "give the plan a start part, such as analytic-init"),
        ("models", "unet", PLAIN, "give the plan a model-switch part"),
        ("cache", "dit", Plan(grid=SpacingGrid(steps=1)), "give the plan 2 steps or more"),
    ],
)
def test_what_an_axis_has_no_use_for(axis, pipe, base, words):
    with pytest.raises(InputError, match=re.escape(words)):
        Space.of(pipeline(pipe), base, [axis])


@pytest.mark.parametrize(
    ("axis", "pipe", "plan", "words"),
    [
        ("correction", "dit", {"correction": EpsilonScaling(scale=1.2)}, "scale 1.2 is outside the range of the corr"),
        ("correction", "dit", {"correction": EpsilonScaling(scale=1, slope=0.5)}, "slope 0.5 is outside the range"),
        ("conditioning", "dit", {"conditioning": TimeShift(window=20)}, "conditioning is 'time-shift' and the"),
        (
            "conditioning",
            "dit",
            {"conditioning": Aligner(ratios=(1, 1, 1))},
            "has 3 ratios and the conditioning axis 4",
        ),
        ("conditioning", "dit", {"conditioning": Aligner(ratios=(1, 1.1, 1, 1))}, "are not on one line"),
        ("conditioning", "dit", {"conditioning": Aligner(ratios=(2, 1.5, 1, 1))}, "first ratio 2 is outside the range"),
        ("guidance", "dit", {"guidance": ConstantGuidance(scale=50)}, "guidance scale 50 is outside the range of the"),
        ("guidance", "dit", {"guidance": ConstantGuidance(scale=2, rescale=0.5)}, "the plan's rescale is 0.5 and that"),
        ("guidance", "dit", {"guidance": GuidanceSchedule(scale=(2, 1, 2, 1))}, "not on one line within one window"),
        ("guidance", "dit", {"guidance": GuidanceSchedule(scale=(2, 3))}, "lists 2 guidance scales and the guidance"),
        ("guidance-scale", "dit", {"guidance": GuidanceSchedule(scale=(2, 3))}, "lists 2 guidance scales"),
        (
            "solver",
            "dit",
            {"solver": DiffusersSolver(scheduler="LMSDiscreteScheduler")},
            "LMSDiscreteScheduler with {}",
        ),
        (
            "cache",
            "dit",
            {"caches": (BlockMask(rows=("11", "01", "11", "11")),)},
            "block mask is not in the cache axis",
        ),
        ("cache", "dit", {"caches": (uniform_mask(4, 2), uniform_mask(4, 2))}, "has 2 caches of one kind"),
        ("cache", "dit", {"caches": (uniform_mask(6, 2),)}, "block mask is not in the cache axis"),
        ("cache", "dit", {"caches": (BlockMask(rows=tuple("1011")),)}, "steps (0, 2, 3), which no rhythm"),
        ("cache", "unet", {"caches": (UNetDeep(interval=2, depth=5),)}, "cut 5.0 is not in the cache axis"),
        ("cache", "unet", {"caches": (UNetDeep(steps=(0, 2, 3)),)}, "steps (0, 2, 3), which no rhythm"),
    ],
)
def test_plans_that_are_not_in_an_axis(axis, pipe, plan, words):
    space = Space.of(pipeline(pipe), PLAIN, [axis])
    with pytest.raises(InputError, match=re.escape(words)):
        space.params(PLAIN.model_copy(update=plan))


class TestSolver:
    def test_the_solvers_of_a_process(self):
        for pipes, known in ((("dit", "unet"), VARIANCE_PRESERVING), (("sd3", "wan", "qwen"), FLOW)):
            for pipe in pipes:
                assert SolverAxis.of(pipeline(pipe), Plan()).choices == known

    def test_orders_that_few_steps_do_not_reach_are_left_out(self):
        names = [name for name, _ in SolverAxis.of(pipeline("unet"), PLAIN).choices]
        assert names == [name for name, _ in VARIANCE_PRESERVING if "3" not in name]

    @pytest.mark.parametrize("pipe", ["dit", "unet", "sd3"])
    @pytest.mark.filterwarnings("ignore")
    def test_each_runs_with_one_evaluation_a_step_and_its_own_result(self, pipe):
        pipe = pipeline(pipe)
        results = []
        base = Plan(grid=ExplicitGrid(timesteps=(950.0, 720.0, 530.0, 310.0, 110.0)))
        for _, solver in SolverAxis.of(pipe, base).choices:
            with attach(pipe, base.model_copy(update={"solver": solver})) as attached:
                images = pipe(**call_arguments(pipe, batch=1)).images
            assert [step.evaluations for step in attached.stats.steps] == [1] * 5
            assert np.isfinite(images).all()
            results.append(images.tobytes())
        assert len(set(results)) == len(results) > 5

    @pytest.mark.parametrize(
        ("plan", "name"),
        [
            (Plan(), "ddim"),
            (Plan(solver=DiffusersSolver(scheduler="DPMSolverMultistepScheduler")), "dpmpp-2m"),
            (
                Plan(
                    solver=DiffusersSolver(
                        scheduler="UniPCMultistepScheduler",
                        config={"use_karras_sigmas": True, "timestep_spacing": "trailing"},
                    )
                ),
                "unipc-2",
            ),
        ],
    )
    def test_a_plan_in_other_words(self, plan, name):
        assert Space.of(pipeline("unet"), PLAIN, ["solver"]).params(plan) == {"solver.name": name}

    def test_the_pipelines_own_grid_is_off(self):
        pipe = tiny_unet(
            DDPMPipeline, DPMSolverMultistepScheduler(use_karras_sigmas=True, prediction_type="v_prediction")
        )
        configs = {name: part.config for name, part in SolverAxis.of(pipe, Plan()).choices}
        assert configs["dpmpp-2m"]["use_karras_sigmas"] is configs["unipc-2"]["use_karras_sigmas"] is False
        assert configs["ddim"] == {"clip_sample": False}  # it takes no such option

    def test_nothing_is_clipped_that_the_pipeline_does_not_clip(self):
        pipe = tiny_unet(DDPMPipeline, DPMSolverMultistepScheduler(prediction_type="v_prediction"))
        assert dict(SolverAxis.of(pipe, Plan()).choices)["ddim"].config == {"clip_sample": False}
        assert dict(SolverAxis.of(pipeline("unet"), Plan()).choices)["ddim"].config == {}

    def test_other_noise_levels_are_left_out(self):
        pipe = tiny_unet(scheduler=tiny_scheduler(rescale_betas_zero_snr=True))
        names = [name for name, _ in SolverAxis.of(pipe, PLAIN).choices]
        assert {"ddim", "dpmpp-2m"} <= set(names)
        assert "deis-2" not in names

    def test_choices_of_ones_own(self):
        part = DiffusersSolver(scheduler="EulerDiscreteScheduler")
        space = Space(PLAIN, (SolverAxis(pipeline("unet"), (("euler", part),)),))
        assert space.plan({"solver.name": "euler"}).solver == part
        with pytest.raises(InputError, match=r"one or more solvers of different names; got \['a', 'a'\]"):
            SolverAxis(pipeline("unet"), (("a", part), ("a", part)))


class TestGuidance:
    def axis(self, **options):
        return GuidanceAxis(4.0, (1.0, 7.0), 4, **options)

    def plan(self, axis, **params):
        return Space(PLAIN, (axis,)).plan({f"guidance.{name}": value for name, value in params.items()}).guidance

    def test_a_line_in_a_window(self):
        part = self.plan(self.axis(), first=2.0, last=5.0, start=0.0, stop=1.0)
        assert part == GuidanceSchedule(scale=(2.0, 3.0, 4.0, 5.0))
        part = self.plan(self.axis(), first=2.0, last=5.0, start=1 / 3, stop=0.5)
        assert part == GuidanceSchedule(scale=(1.0, 2.0, 5.0, 1.0))
        part = self.plan(self.axis(), first=2.0, last=5.0, start=1.0, stop=0.0)
        assert part == GuidanceSchedule(scale=(1.0, 1.0, 1.0, 2.0))

    def test_small_scales_are_off(self):
        part = self.plan(self.axis(), first=1.01, last=4.0, start=0.0, stop=1.0)
        assert part == GuidanceSchedule(scale=(1.0, 2.01, 3.0, 4.0))
        assert self.plan(self.axis(), first=1.04, last=1.0, start=0.0, stop=1.0) == ConstantGuidance(scale=1)

    def test_one_scale_for_all_steps_is_a_constant(self):
        assert self.plan(self.axis(), first=2.504, last=2.496, start=0.0, stop=1.0) == ConstantGuidance(scale=2.5)
        alone = self.axis(changes=False, window=False)
        assert self.plan(alone, scale=2.5) == ConstantGuidance(scale=2.5)
        true = GuidanceAxis(4.0, (1.05, 7.0), 4, true_cfg=True)
        assert self.plan(true, first=2.5, last=2.5, start=0.0, stop=1.0) == GuidanceSchedule(scale=2.5)

    def test_a_plan_without_guidance_is_the_pipelines_own(self):
        space = Space.of(pipeline("stable-diffusion"), PLAIN, ["guidance-scale"])
        assert space.params(PLAIN) == {"guidance.scale": 7.5}
        assert Space(PLAIN, (self.axis(window=False),)).params(
            PLAIN.model_copy(update={"guidance": ConstantGuidance(scale=0)})
        ) == {"guidance.first": 1.0, "guidance.last": 1.0}

    def test_what_the_axis_cannot_say(self):
        schedule = PLAIN.model_copy(update={"guidance": GuidanceSchedule(scale=(1.0, 2.0, 2.0, 2.0))})
        with pytest.raises(InputError, match="off in some steps and the guidance axis is on in all"):
            self.axis(window=False).params(schedule)
        schedule = PLAIN.model_copy(update={"guidance": GuidanceSchedule(scale=(2.0, 3.0, 4.0, 5.0))})
        with pytest.raises(InputError, match="changes over the steps and the guidance axis has one scale"):
            self.axis(changes=False).params(schedule)
        with pytest.raises(InputError, match=r"guidance scales range from 1 at least to something greater"):
            GuidanceAxis(4.0, (0.5, 7.0), 4)
        with pytest.raises(InputError, match="needs their number"):
            GuidanceAxis(4.0, (1.0, 7.0))


class TestOthers:
    def test_no_correction_changes_nothing(self):
        space = Space(PLAIN, (CorrectionAxis(slope=(-0.01, 0.01)),))
        assert space.plan({"correction.scale": 1.0004, "correction.slope": -0.00004}).correction is None
        assert space.params(PLAIN) == {"correction.scale": 1.0, "correction.slope": 0.0}
        part = space.plan({"correction.scale": 1.0304, "correction.slope": 0.00212}).correction
        assert part == EpsilonScaling(scale=1.03, slope=0.0021)

    def test_ratios_on_a_line(self):
        space = Space.of(pipeline("unet"), PLAIN, ["conditioning"])
        part = space.plan({"conditioning.first": 0.97, "conditioning.last": 1.03}).conditioning
        assert part == Aligner(ratios=(0.97, 0.99, 1.01, 1.03))
        assert space.plan({"conditioning.first": 1.0, "conditioning.last": 1.0}).conditioning is None

    def test_rhythms(self):
        rhythm = Rhythm(6, (1, 4), (1, 3))
        assert rhythm.computed(1, 2) == (0, 1, 2, 3, 4, 5)
        assert rhythm.computed(2, 1) == (0, 2, 4)
        assert rhythm.computed(3, 2) == (0, 1, 4)
        assert rhythm.params("cache", (0, 1, 4)) == {"cache.every": 3, "cache.kept": 2}
        assert Rhythm.of("cache", PLAIN) == Rhythm(4, (1, 4), (1, 2))

    def test_a_uniform_mask_is_found_and_other_caches_stay(self):
        pipe = pipeline("dit")
        space = Space.of(pipe, PLAIN, ["cache"])
        mask, deep = uniform_mask(4, 3, order=1), UNetDeep(interval=2)
        params = space.params(PLAIN.model_copy(update={"caches": (deep, mask)}))
        assert params == {"cache.every": 3, "cache.kept": 1, "cache.targets": "block", "cache.order": 1}
        other = Space(PLAIN.model_copy(update={"caches": (deep, mask)}), space.axes)
        assert other.plan(params | {"cache.every": 2}).caches == (deep, uniform_mask(4, 2, order=1))
        assert other.plan(params | {"cache.every": 1}).caches == (deep,)

    def test_an_interval_of_a_unet_is_found(self):
        space = Space.of(pipeline("unet"), PLAIN, ["cache"])
        params = space.params(PLAIN.model_copy(update={"caches": (UNetDeep(interval=2),)}))
        assert params == {"cache.every": 2, "cache.kept": 1, "cache.cut": "0.0"}
        assert space.plan(params).caches == (UNetDeep(steps=(0, 2)),)

    def test_a_switch_by_time_is_found(self):
        space = Space.of(pipeline("unet"), SWITCHED, ["models"])
        by_time = SWITCHED.model_copy(update={"models": ModelSwitch(networks=("self", "other"), times=(500.0,))})
        assert space.params(SWITCHED) == space.params(by_time) == {"models.step": 2}
        with pytest.raises(InputError, match="are not the networks of the models axis"):
            space.params(SWITCHED.model_copy(update={"models": ModelSwitch(networks=("self", "small"), steps=(2,))}))
        with pytest.raises(InputError, match="switches between two networks; the model-switch part names self"):
            ModelsAxis(pipeline("unet"), ModelSwitch(networks=("self",)), 4)

    def test_another_start_is_refused(self):
        space = Space.of(pipeline("unet"), STARTED, ["start"])
        assert space.params(PLAIN) == {"start.on": False}
        with pytest.raises(InputError, match="is not that of the start axis"):
            space.params(PLAIN.model_copy(update={"start": AnalyticInit(file="other.safetensors")}))
