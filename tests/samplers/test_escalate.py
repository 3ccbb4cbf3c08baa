"""Escalation: the student's samples, the teacher's where the judge says so, each by itself."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from test_attach import state_of
from test_model_switch import other_network
from tiny import TINY, call_arguments, generators, tiny_dit, tiny_stable_diffusion, tiny_unet

from fewstep.samplers import (
    ConstantGuidance,
    DiffusersSolver,
    ExplicitGrid,
    InputError,
    Plan,
    PlanWarning,
    Process,
    SpacingGrid,
    TunedFor,
    attach,
)
from fewstep.samplers.escalate import NONE_ESCALATED, Escalate, calibrate_escalation, fresh_generators
from fewstep.samplers.model_switch import ModelSwitch

ALL, NONE = -NONE_ESCALATED, NONE_ESCALATED
TEACHER = Plan(grid=SpacingGrid(steps=6))


def plan_of(threshold, /, teacher=TEACHER, strength=0.5, steps=2, **options):
    return Plan(
        grid=SpacingGrid(steps=steps),
        models=Escalate(teacher=teacher, strength=strength, threshold=threshold, **options),
    )


def brightness(samples, conditions):
    return samples.double().flatten(1).mean(1)


class Judge:
    """Gives the listed scores in turn, and keeps what it saw."""

    def __init__(self, *scores):
        self.scores, self.seen = list(scores), []

    def __call__(self, samples, conditions):
        self.seen.append((samples.clone(), conditions))
        return torch.tensor([self.scores.pop(0) for _ in samples])


def images_of(pipe, plan, judge=brightness, **arguments):
    with attach(pipe, plan, {"scorer": judge}) as handle:
        output = pipe(**(call_arguments(pipe) | arguments))
    return output[0], handle.stats


@pytest.mark.parametrize("kind", ["np", "pt", "pil", "latent"])
@pytest.mark.parametrize("name", TINY)
def test_with_nothing_rejected_the_student_is_alone(name, kind):
    if kind == "latent" and name in ("dit", "unet"):
        pytest.skip("the pipeline has no such output")
    pipe = TINY[name]()
    with attach(pipe, Plan(grid=SpacingGrid(steps=2))) as handle:
        expected = pipe(**call_arguments(pipe) | {"output_type": kind}).images
    for samples in ("latents",) if kind == "latent" else ("images", "latents"):
        images, stats = images_of(pipe, plan_of(NONE, samples=samples), output_type=kind)
        assert type(images) is type(expected)
        for image, wanted in zip(images, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(image), np.asarray(wanted))
        assert (stats.nfe, stats.rows) == (handle.stats.nfe, handle.stats.rows)
        assert [(work.name, work.samples, work.evaluations) for work in stats.work] == [("scorer", 2, 1)]


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_all_rejected_is_image_to_image_on_the_students_latents(scheduler, strength):
    """Second implementation: diffusers' own image-to-image pipeline, given latents."""
    pipe = tiny_stable_diffusion()
    with attach(pipe, Plan(grid=SpacingGrid(steps=2))):
        latents = torch.as_tensor(pipe(**call_arguments(pipe) | {"output_type": "latent"}).images)
    teacher = Plan(solver=DiffusersSolver(scheduler=scheduler), grid=SpacingGrid(steps=5, spacing="trailing"))
    images, stats = images_of(pipe, plan_of(ALL, teacher=teacher, strength=strength))
    own = call_arguments(pipe)["generator"]
    for generator in own:
        torch.randn(latents.shape[1:], generator=generator)
    by_hand = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    by_hand.scheduler = _scheduler(pipe, scheduler)
    by_hand.set_progress_bar_config(disable=True)
    call = call_arguments(pipe) | {"generator": fresh_generators(own, [0, 1], 2)}
    for name in ("height", "width"):
        del call[name]
    expected = by_hand(image=latents, strength=strength, num_inference_steps=5, **call).images
    np.testing.assert_allclose(images, expected, atol=2e-4)
    assert stats.nfe == 2 * (2 + 5 * strength)
    assert [step.rows for step in stats.steps] == [4] * int(2 + 5 * strength)
    assert [(work.name, work.samples, work.evaluations) for work in stats.work] == [
        ("scorer", 2, 1),
        ("teacher", 2, int(5 * strength)),
    ]


def _scheduler(pipe, name):
    return getattr(diffusers, name).from_config(pipe.scheduler.config, timestep_spacing="trailing")


def test_all_rejected_in_closed_form():
    """Pixel space, one teacher step: x0 of the network at alpha x0 + sigma noise."""
    pipe = tiny_unet()
    judge = Judge(0.0, 0.0)
    plan = plan_of(ALL, teacher=Plan(grid=ExplicitGrid(timesteps=(400,))), strength=1.0, samples="latents")
    images, _ = images_of(pipe, plan, judge, output_type="pt")
    student = judge.seen[0][0]
    with attach(pipe, Plan(grid=SpacingGrid(steps=2))):
        plain = pipe(**call_arguments(pipe) | {"output_type": "pt"}).images
    torch.testing.assert_close((student / 2 + 0.5).clamp(0, 1), plain, atol=0, rtol=0)
    own = generators(2)
    for generator in own:
        torch.randn(1, 8, 8, generator=generator)
    noise = torch.stack([torch.randn(1, 8, 8, generator=g) for g in fresh_generators(own, [0, 1], 2)])
    process = Process.from_scheduler(pipe.scheduler)
    x = process.add_noise(student, noise, 400.0)
    with torch.no_grad():
        expected = process.to_x0(pipe.unet(x, 400).sample, x, 400.0)
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("samples", ["images", "latents"])
@pytest.mark.parametrize("name", TINY)
def test_a_batch_is_a_stack_of_singles(name, samples):
    pipe = TINY[name]()
    judge = Judge(0.0, 1.0, 0.0)
    batch = call_arguments(pipe, batch=3)
    images, stats = images_of(pipe, plan_of(0.5, samples=samples), judge, **batch)
    assert [work.samples for work in stats.work] == [3, 2]
    assert judge.seen[0][0].shape[0] == 3
    conditions = judge.seen[0][1]
    assert set(conditions) == {
        n for n in batch if n not in ("generator", "output_type", "batch_size", "height", "width")
    }
    for index, verdict in enumerate((0.0, 1.0, 0.0)):
        single = {
            key: value[index : index + 1] if isinstance(value, list | torch.Tensor) else value
            for key, value in call_arguments(pipe, batch=3).items()
        }
        if "batch_size" in single:
            single["batch_size"] = 1
        alone, _ = images_of(pipe, plan_of(0.5, samples=samples), Judge(verdict), **single)
        np.testing.assert_allclose(images[index : index + 1], alone, atol=2e-5)
    plain, _ = images_of(pipe, plan_of(NONE), **call_arguments(pipe, batch=3))
    np.testing.assert_array_equal(images[1], plain[1])
    assert np.abs(images[0] - plain[0]).max() > 1e-3


def test_same_seeds_same_samples_and_no_global_noise():
    pipe = tiny_unet()
    plan = plan_of(ALL, teacher=Plan(solver=DiffusersSolver(scheduler="DDPMScheduler"), grid=SpacingGrid(steps=6)))
    state = torch.get_rng_state()
    first, _ = images_of(pipe, plan)
    second, _ = images_of(pipe, plan)
    np.testing.assert_array_equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    third, _ = images_of(pipe, plan, generator=generators(2, first=7))
    assert np.abs(first - third).max() > 1e-3


def test_one_generator_for_the_batch():
    pipe = tiny_dit()
    one = {"generator": torch.Generator().manual_seed(3), "class_labels": [1, 2]}
    both, _ = images_of(pipe, plan_of(0.5), Judge(0.0, 0.0), **one)
    one["generator"].manual_seed(3)
    last, _ = images_of(pipe, plan_of(0.5), Judge(1.0, 0.0), **one)
    np.testing.assert_allclose(both[1], last[1], atol=2e-5)


def test_the_teacher_runs_another_network_at_another_guidance():
    pipe = tiny_dit()
    big = other_network(pipe)
    teacher = Plan(
        grid=SpacingGrid(steps=4), guidance=ConstantGuidance(scale=1.0), models=ModelSwitch(networks=("big",))
    )
    plan = plan_of(ALL, teacher=teacher).model_copy(update={"guidance": ConstantGuidance(scale=3.0)})
    with attach(pipe, plan, {"scorer": brightness, "big": big}) as handle:
        pipe(**call_arguments(pipe))
    assert handle.stats.rows_by_network == {"transformer": 8, "big": 4}
    assert [step.network for step in handle.stats.steps] == ["transformer"] * 2 + ["big"] * 2
    assert handle.stats.nfe == 6


def test_a_teacher_for_other_weights_warns_once():
    pipe = tiny_dit()
    teacher = TEACHER.model_copy(update={"tuned_for": TunedFor(pipeline="FluxPipeline")})
    with pytest.warns(PlanWarning) as caught, attach(pipe, plan_of(0.0, teacher=teacher), {"scorer": brightness}):
        pass
    assert [str(warning.message) for warning in caught] == [
        "teacher of the escalate part: the plan was tuned for FluxPipeline, not for DiTPipeline"
    ]


def test_whatever_raises_the_pipeline_is_as_before():
    pipe = tiny_dit()
    before = state_of(pipe)
    plain = pipe(**call_arguments(pipe), num_inference_steps=3).images

    def broken(samples, conditions):
        raise RuntimeError("judge")

    with pytest.raises(RuntimeError, match="judge"), attach(pipe, plan_of(0.0), {"scorer": broken}) as handle:
        pipe(**call_arguments(pipe))
    assert not handle.stats.finished
    assert state_of(pipe) == before
    with attach(pipe, plan_of(ALL), {"scorer": brightness}) as handle:
        expected = pipe(**call_arguments(pipe)).images
        calls = []
        hook = pipe.vae.decoder.register_forward_pre_hook(
            lambda *_: calls.append(1) if not calls else (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):  # in the teacher's decoder
            pipe(**call_arguments(pipe))
        hook.remove()
        assert calls == [1]
        np.testing.assert_array_equal(pipe(**call_arguments(pipe)).images, expected)
    assert state_of(pipe) == before
    np.testing.assert_array_equal(pipe(**call_arguments(pipe), num_inference_steps=3).images, plain)


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        (lambda s, c: torch.zeros(len(s), 1), r"a scorer gives one number a sample, \(2,\); got \(2, 1\)"),
        (lambda s, c: torch.tensor([0.0, float("nan")]), "the scorer gave nan for sample 1; give finite numbers"),
        ("judge", "a scorer is called with samples and conditions; got str"),
    ],
)
def test_scorers_that_do_not_score(judge, words):
    with pytest.raises(InputError, match=words):
        images_of(tiny_dit(), plan_of(0.0), judge)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teacher": Plan()}, "the teacher needs a grid; add a grid part to its plan"),
        ({"teacher": plan_of(0.0)}, "a teacher does not escalate; give one teacher"),
        ({"teacher": {"grid": None}}, "teacher is not a fewstep plan"),
        ({"teacher": {"fewstep_plan": 1, "grdi": None}}, "teacher: unknown part 'grdi'; did you mean 'grid'"),
        ({"strength": 0.0}, "greater than 0"),
    ],
)
def test_parts_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        plan_of(0.0, **options)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (plan_of(0.0, strength=0.1), "teacher of the escalate part: strength 0.1 leaves none of the teacher's 6 steps"),
        (
            plan_of(0.0, teacher=Plan(solver=DiffusersSolver(scheduler="DIMScheduler"), grid=SpacingGrid(steps=2))),
            "teacher of the escalate part: unknown scheduler 'DIMScheduler'",
        ),
        (
            plan_of(0.0, teacher=Plan(solver=DiffusersSolver(scheduler="HeunDiscreteScheduler"), grid=TEACHER.grid)),
            "visits times that are no steps of its grid; give explicit timesteps",
        ),
        (plan_of(0.0, scorer="judge"), "the escalate part needs 'judge'; hand it over"),
    ],
)
def test_plans_that_are_refused_before_the_pipeline_is_touched(plan, words):
    pipe = tiny_dit()
    before = state_of(pipe)
    with pytest.raises(InputError) as caught:
        attach(pipe, plan, {"scorer": brightness})
    assert words in str(caught.value)
    assert state_of(pipe) == before


def test_calls_that_are_refused():
    pipe = tiny_stable_diffusion()
    with pytest.raises(InputError, match="got num_images_per_prompt=2; repeat the prompts"):
        images_of(pipe, plan_of(0.0), num_images_per_prompt=2)
    with pytest.raises(InputError, match="output_type='latent' makes none; use np, pil or pt, or score latents"):
        images_of(pipe, plan_of(0.0), output_type="latent")


def arguments_of(numbers):
    return {
        "class_labels": [number % 10 for number in numbers],
        "generator": [torch.Generator().manual_seed(number) for number in numbers],
        "guidance_scale": 2.0,
        "output_type": "np",
    }


def test_calibration_is_the_percentile_of_the_students_own_scores():
    pipe = tiny_dit()
    plan = plan_of(0.0)
    found = calibrate_escalation(pipe, plan, brightness, arguments_of, 10, 40.0, batch_size=4)
    assert (found.models.calibration_n, found.models.calibration_percentile) == (10, 40.0)
    assert found.models.calibration_guidance == 2.0
    with attach(pipe, Plan(grid=SpacingGrid(steps=2))):
        images = pipe(**arguments_of(range(10)) | {"output_type": "pt"}).images
    scores = images.double().mean((1, 2, 3)).sort().values
    expected = scores[3] + 0.6 * (scores[4] - scores[3])  # position 0.4 * 9 = 3.6
    assert found.models.threshold == pytest.approx(float(expected), abs=1e-6)
    with attach(pipe, found, {"scorer": brightness}) as handle:
        pipe(**arguments_of(range(10)))
        assert [work.samples for work in handle.stats.work] == [10, 4]
        with pytest.raises(InputError, match=r"calibrated at guidance_scale=2\.0; got 4\.0 in the call"):
            pipe(**arguments_of(range(2)) | {"guidance_scale": 4.0})
    assert Plan.from_json(found.to_json()) == found
    assert plan.models.calibration_n is None


def test_calibrations_that_cannot_be():
    pipe = tiny_dit()
    with pytest.raises(InputError, match="takes a plan with an escalate part"):
        calibrate_escalation(pipe, Plan(), brightness, arguments_of, 4)
    with pytest.raises(InputError, match=r"a percentile between 0 and 100; got 4, 100\.0"):
        calibrate_escalation(pipe, plan_of(0.0), brightness, arguments_of, 4, 100.0)
    with pytest.raises(InputError, match="the calls made 2 samples"):
        calibrate_escalation(pipe, plan_of(0.0), brightness, lambda numbers: arguments_of(range(2)), 4)

    def mixed(numbers):
        return arguments_of(numbers) | {"guidance_scale": 2.0 + numbers[0]}

    with pytest.raises(InputError, match=r"at guidance \['2\.0', '3\.0'\]"):
        calibrate_escalation(pipe, plan_of(0.0), brightness, mixed, 2, batch_size=1)
