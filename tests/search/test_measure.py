"""Measuring plans: the numbers of a bench, the same noise for all, and every network row counted."""

import math

import pytest
import torch
from tiny import call_arguments, tiny_dit, tiny_sd3, tiny_unet
from toy_judges import toy_judges

from fewstep.eval import kernel_jackknife, load_feature_net, paired_difference, to_uint8
from fewstep.eval.assets import load_pipeline
from fewstep.eval.conditions import Conditions
from fewstep.eval.generate import ImageSet, generate
from fewstep.eval.reference import demo_images
from fewstep.eval.score import Scorer
from fewstep.eval.timing import WARMUPS, count_flops
from fewstep.samplers import ConstantGuidance, InputError, Plan, SpacingGrid, attach
from fewstep.search.budget import Judges
from fewstep.search.measure import KEPT_PLANS, PAIRS, REPEATS, CandidateError, Measurer
from fewstep.search.objective import PAIRED, RELATIVE_ERROR, Limit, Objective

TEACHER = Plan(grid=SpacingGrid(steps=5, spacing="trailing"))


def steps(count):
    return Plan(grid=SpacingGrid(steps=count, spacing="trailing"))


def generators(numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def pixels(numbers):
    return {"batch_size": len(numbers), "generator": generators(numbers)}


def labels(numbers):
    return {"class_labels": [number % 3 for number in numbers], "generator": generators(numbers)}


def measurer(pipe, quality="fd", call=pixels, *, rungs=(8, 20), limits=(), cost=None, **options):
    objective = Objective(quality, cost, tuple(map(Limit.parse, limits)), rungs)
    return Measurer(pipe, objective, call, toy_judges(), **{"batch_size": 4} | options)


def test_values_are_those_of_a_bench_on_the_same_seeds(tmp_path):
    pipe, judged, n, conditions = tiny_dit(), toy_judges(), 24, Conditions("labels", (0, 1, 2))
    kinds = ("fd", "kd", "precision", "recall", "density", "coverage", "class_accuracy", "vendi", "psnr")
    kinds += ("feature_distance",)
    scores, scorer = None, Scorer(judged.net, judged.real, None, None, conditions, tmp_path, n)
    for plan in (TEACHER, steps(2)):
        images = ImageSet(tmp_path / str(plan.nominal_steps), f"of {plan.nominal_steps}", conditions, range(n))
        generate(pipe, plan, images, call_kwargs={}, batch_size=6)
        scores = scorer.score(images, scores)
    found = measurer(pipe, call=labels, teacher=TEACHER, also=kinds, batch_size=6).measure(steps(2), n)
    assert set(found.values) == set(kinds)
    for kind, value in found.values.items():
        metric = scores.metrics[scorer.name(kind)]
        assert value.value == pytest.approx(metric.value, rel=1e-5), kind
        if kind not in PAIRED:  # a bench has the deviation of the images, not of blocks of them
            assert value.se == pytest.approx(metric.se, rel=1e-5), kind
    assert found.costs == {"nfe": scores.nfe}


def test_the_numbers_of_a_demo_are_those_of_its_own_images():
    pipe, n = load_pipeline("demo:fashion-unet", dtype="float32", device="cpu", download=False), 16
    net = load_feature_net("fashion-features")
    real = demo_images(net)
    pipe.set_progress_bar_config(disable=True)
    with attach(pipe, steps(1)):
        images = torch.as_tensor(pipe(**pixels(range(n)), output_type="np").images).permute(0, 3, 1, 2)
    expected = kernel_jackknife(list(net(to_uint8(images)).split(2)), real.features)
    found = Measurer(pipe, Objective("kd", rungs=(n,)), pixels, Judges(net=net, real=real)).measure(steps(1), n)
    assert found.values["kd"].value == pytest.approx(expected.value, rel=1e-4)
    assert found.values["kd"].se == pytest.approx(expected.se, rel=1e-3)
    with pytest.raises(InputError, match="fd needs at least 256 images, twice the 128 dimensions of fashion-features"):
        Measurer(pipe, Objective("fd", rungs=(n,)), pixels, Judges(net=net, real=real))


def test_going_on_runs_the_new_images_only_and_ends_where_one_go_does():
    pipe = tiny_unet()
    also = ("kd", "relative_error", "psnr", "vendi")
    grown, whole = (measurer(pipe, teacher=TEACHER, also=also, batch_size=3) for _ in range(2))
    first = grown.measure(steps(2), 8)
    assert grown.spent == 8 * (2 + 5)
    last = grown.measure(steps(2), 20)
    assert grown.spent == 20 * (2 + 5)
    assert grown._judges.net.seen == 2 * 20
    assert whole.measure(steps(2), 20) == last
    assert whole.measure(steps(2), 8) == first
    assert whole.spent == 20 * (2 + 5)
    assert [value.n for value in (first.values["fd"], last.values["fd"])] == [8, 20]


def test_the_size_of_the_batches_changes_rounding_only():
    a, b = (
        measurer(tiny_dit(), call=labels, teacher=TEACHER, also=("relative_error",), batch_size=size).measure(
            steps(2), 20
        )
        for size in (1, 20)
    )
    assert a.values["relative_error"].value > 0.01
    for name, value in a.values.items():
        assert value.value == pytest.approx(b.values[name].value, rel=1e-3), name


def test_all_plans_have_the_same_numbers():
    asked = []

    def call(numbers):
        asked.append(list(numbers))
        return pixels(numbers)

    found = measurer(tiny_unet(), call=call, first=100, also=("kd",))
    for plan in (steps(2), steps(3)):
        asked.clear()
        found.measure(plan, 8)
        assert asked[:2] == [[100, 101, 102, 103], [104, 105, 106, 107]]


def test_noise_that_no_generator_gives_is_the_same_each_time():
    def call(numbers):
        return {"batch_size": len(numbers)}

    pipe = tiny_unet()
    before = torch.get_rng_state()
    a, b = (measurer(pipe, call=call).measure(steps(2), 8) for _ in range(2))
    assert a == b
    assert torch.equal(torch.get_rng_state(), before)


def test_the_teacher_beside_itself_costs_nothing_and_differs_by_nothing():
    found = measurer(tiny_unet(), teacher=TEACHER, also=("relative_error", "feature_distance"))
    itself = found.measure(TEACHER.model_copy(update={"name": "other"}), 8)
    assert found.spent == 8 * 5
    assert itself.values["relative_error"].value == itself.values["feature_distance"].value == 0
    teacher = found.measure_teacher(8)
    assert set(teacher.values) == {"fd"}
    assert found.measure_teacher(8) is teacher
    assert teacher.values["fd"] == itself.values["fd"]
    assert found.spent == 8 * 5


def test_values_of_two_plans_can_be_paired_and_limits_compare_with_the_teacher():
    found = measurer(tiny_unet(), teacher=TEACHER, limits=("fd<=1.5*teacher", "nfe<=2"))
    ours, theirs = found.measure(steps(3), 20), found.measure_teacher(20)
    difference = paired_difference(ours.values["fd"], theirs.values["fd"])
    assert difference.value == ours.values["fd"].value - theirs.values["fd"].value
    bound = 1.5 * theirs.numbers["fd"]
    expected = ((ours.numbers["fd"] - bound) / bound, 0.5)
    assert found._objective.violations(ours, theirs) == pytest.approx(expected)


def test_relative_errors_are_of_what_the_pipeline_returns():
    pipe, plans = tiny_sd3(), [Plan(grid=SpacingGrid(steps=count)) for count in (2, 4)]

    def call(numbers):
        one = call_arguments(pipe, batch=len(numbers))
        return one | {"generator": generators(numbers), "output_type": "latent", "guidance_scale": 1.0}

    found = measurer(pipe, "relative_error", call, teacher=plans[1], rungs=(4,)).measure(plans[0], 4)
    assert found.values["relative_error"].sizes == (2, 2)
    latents = []
    for plan in plans:
        with attach(pipe, plan):
            latents.append(pipe(**call(range(4))).images.flatten(1).double())
    errors = (latents[0] - latents[1]).norm(dim=1) / latents[1].norm(dim=1)
    assert found.values["relative_error"].value == pytest.approx(errors.mean().item(), rel=1e-5)
    halves = errors.unflatten(0, (2, 2)).mean(1)
    assert found.values["relative_error"].se == pytest.approx(halves.std().item() / math.sqrt(2), rel=1e-5)


def test_paired_qualities_of_two_plans_differ_by_what_their_images_do():
    """The difference has the error of the blocks' differences, whatever the plans have in common."""
    found = measurer(tiny_unet(), "psnr", teacher=TEACHER, also=tuple(PAIRED - {"lpips", "ssim"}), rungs=(8, 40))
    pairs = [found.measure(steps(count), 40).values for count in (2, 3)]
    assert {*PAIRS, RELATIVE_ERROR} == PAIRED
    for name in pairs[0]:
        ours, theirs = (values[name] for values in pairs)
        assert ours.sizes == (2,) * 20
        gap = paired_difference(ours, theirs)
        assert gap.value == pytest.approx(ours.value - theirs.value)
        blocks = [[40 * each.value - 38 * rest for rest in each.replicates] for each in (ours, theirs)]
        differences = (torch.tensor(blocks[0], dtype=torch.float64) - torch.tensor(blocks[1])) / 2
        assert gap.se == pytest.approx(differences.std().item() / math.sqrt(20), rel=1e-3), name
    samples = []
    for plan in (steps(2), TEACHER):
        pipe = tiny_unet()
        with attach(pipe, plan):
            batches = [
                torch.as_tensor(pipe(**pixels(range(at, at + 4)), output_type="np").images) for at in range(0, 40, 4)
            ]
        samples.append(torch.cat(batches).double().flatten(1))
    errors = (samples[0] - samples[1]).norm(dim=1) / samples[1].norm(dim=1)
    rests = [errors[[row for row in range(40) if row // 2 != block]].mean().item() for block in range(20)]
    assert pairs[0]["relative_error"].replicates == pytest.approx(rests, rel=1e-5)


def test_a_guided_step_counts_two_rows():
    guided = steps(3).model_copy(update={"guidance": ConstantGuidance(scale=4.0)})
    plain = steps(3).model_copy(update={"guidance": ConstantGuidance(scale=1.0)})
    found = measurer(tiny_dit(), call=labels)
    assert found.measure(guided, 8).costs["nfe"] == 6
    assert found.spent == 8 * 6
    assert found.measure(plain, 8).costs["nfe"] == 3
    assert found.spent == 8 * (6 + 3)


def test_flops_and_latency_are_of_one_image_and_measured_once():
    pipe = tiny_unet()
    found = measurer(pipe, cost="flops", limits=("latency_s<=100",))
    costs = {count: found.measure(steps(count), 8).costs for count in (2, 3, 5)}
    assert found.spent == (2 + 3 + 5) * (8 + 1 + WARMUPS + REPEATS)
    assert costs[5]["flops"] - costs[3]["flops"] == 2 * (costs[3]["flops"] - costs[2]["flops"]) > 0
    with attach(pipe, steps(3)):
        assert costs[3]["flops"] == count_flops(lambda: pipe(**pixels([7])))
    assert all(0 < cost["latency_s"] < 100 for cost in costs.values())
    again = found.measure(steps(5), 20)
    assert again.costs == costs[5]
    assert found.spent == (2 + 3 + 5) * (8 + 1 + WARMUPS + REPEATS) + 12 * 5


def test_few_plans_are_kept():
    found = measurer(tiny_unet())
    for count in range(1, KEPT_PLANS + 2):
        found.measure(steps(count), 8)
    spent = found.spent
    found.measure(steps(2), 8)
    assert found.spent == spent
    found.measure(steps(1), 8)
    assert found.spent == spent + 8


def test_plans_that_fail_say_why_and_leave_the_pipeline_alone():
    pipe = tiny_unet()
    scheduler, found = pipe.scheduler, measurer(pipe)
    with pytest.raises(CandidateError, match="DDIMPipeline takes no argument 'guidance_scale'; remove") as failed:
        found.measure(Plan(guidance=ConstantGuidance(scale=2.0)), 8)
    assert failed.value.reason == str(failed.value)
    assert found.spent == 0
    assert pipe.scheduler is scheduler
    assert found.measure(steps(2), 8).costs == {"nfe": 2}


def test_samples_that_are_not_finite_fail_and_their_rows_count():
    wild = steps(2).model_copy(update={"guidance": ConstantGuidance(scale=3e38)})
    found = measurer(tiny_dit(), call=labels)
    with pytest.raises(CandidateError, match="4 of 4 samples hold NaN or infinity"):
        found.measure(wild, 8)
    assert found.spent == 4 * 4
    with pytest.raises(InputError, match="the teacher's plan cannot be measured: 4 of 4 samples hold NaN"):
        measurer(tiny_dit(), "psnr", labels, teacher=wild).measure(steps(2), 8)


def test_other_errors_are_not_those_of_the_plan():
    def call(numbers):
        if len(numbers) == 4 and 4 in numbers:
            raise InputError("no more samples")
        return pixels(numbers)

    pipe = tiny_unet()
    with pytest.raises(InputError, match="no more samples"):
        measurer(pipe, call=call).measure(steps(1), 8)
    assert math.isfinite(measurer(pipe).measure(steps(1), 8).numbers["fd"])  # nothing is attached any more


def test_what_is_measured_besides_waits_for_enough_images():
    found = measurer(tiny_unet(), "relative_error", teacher=TEACHER, also=("fd",), rungs=(4,))
    assert found.measure(steps(2), 4).values.keys() == {"relative_error"}
    both = found.measure(steps(2), 8).values
    assert both.keys() == {"relative_error", "fd"}
    assert both["fd"] == measurer(tiny_unet()).measure(steps(2), 8).values["fd"]
    found.check_enough(8)
    with pytest.raises(InputError, match="fd needs at least 8 images, twice the 4 dimensions of toy; got 7"):
        found.check_enough(7)


@pytest.mark.parametrize(
    ("quality", "options", "words"),
    [
        ("fd", {"rungs": (4, 20)}, "fd needs at least 8 images, twice the 4 dimensions of toy; got 4; measure on more"),
        ("psnr", {}, "psnr compares with a teacher's samples; give its plan, or another quantity"),
        ("fd", {"limits": ("fd<=2*teacher",)}, r"the limit fd<=2\*teacher needs a teacher; give its plan, or a number"),
        ("class_accuracy", {}, "class_accuracy cannot be measured: it needs a network that names classes, and class"),
        ("clip_score", {}, "clip_score cannot be measured: it needs prompts and a CLIP folder, see --clip_path"),
        ("lpips", {"teacher": TEACHER}, "lpips cannot be measured: it needs the weights of its backbone"),
        ("fd", {"limits": ("clip_score>=20",)}, "clip_score cannot be measured"),
        ("fd", {"also": ("recal",)}, "unknown quantity 'recal'; did you mean 'recall'"),
        ("fd", {"batch_size": 0}, "a call has at least one sample; got a batch size of 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(quality, options, words):
    with pytest.raises(InputError, match=words):
        measurer(tiny_unet(), quality, **options)


def test_judges_and_images_that_lack_are_named():
    with pytest.raises(InputError, match="fd cannot be measured: it needs a feature network, see --net"):
        Measurer(tiny_unet(), Objective(), pixels)
    found = measurer(tiny_unet(), rungs=(8,))
    with pytest.raises(InputError, match="fd needs at least 8 images"):
        found.measure(steps(2), 5)
    with pytest.raises(InputError, match="a plan is measured on at least 4 images; got 3"):
        found.measure(steps(2), 3)
    with pytest.raises(InputError, match="there is no teacher to measure; give its plan"):
        found.measure_teacher(8)
