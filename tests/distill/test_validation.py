"""Validation shows the deployed student and leaves no trace in the training."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from method_cases import TinySource, method_of
from PIL import Image
from rich.console import Console
from test_export import trained
from tiny import tiny_dit
from toy_method import fresh_accelerator, options

from fewstep.distill.export import Student, deployed_plan
from fewstep.distill.loop import Loop
from fewstep.distill.lora import LoraSetting
from fewstep.distill.pictures import Row, labelled_rows
from fewstep.distill.plots import _panels, _smoothed, write_plots
from fewstep.distill.progress import together, training_bar
from fewstep.distill.run_log import RunLog
from fewstep.distill.validation import Judge, Shown, Validation
from fewstep.eval.conditions import Conditions
from fewstep.eval.features import FeatureStats
from fewstep.eval.paired import psnr
from fewstep.eval.progress import Meter, meter
from fewstep.eval.reference import RealImages
from fewstep.samplers import DiffusersSolver, Plan, SpacingGrid, attach
from fewstep.samplers.errors import InputError

METHOD = method_of("lcm")
TEACHER = Plan(
    solver=DiffusersSolver(scheduler="DDIMScheduler"),
    grid=SpacingGrid(steps=3, spacing="trailing"),
)
LABELS = Conditions("labels", (3, 4))


class ToyNet:
    """Features that are means of the image's quarters."""

    name, dim, channels, preprocess, fingerprint = "toy", 4, (1,), "none", "toy"

    def __call__(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def real_images():
    features = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)) * 30 + 128
    stats = FeatureStats.from_features(features, fingerprint="toy")
    return RealImages("toy", "key", stats, None, {})


def validation(tmp_path, pipe, team, every=2, last=5, steps=(1, 2), judge=None, accelerator=None, count=3, **kwargs):
    plans = {each: METHOD.plan(team.process, each) for each in steps}
    accelerator = accelerator or fresh_accelerator(options(tmp_path))
    return Validation(
        Student(pipe, "transformer", team, "student", METHOD, plans), TEACHER, accelerator,
        folder=tmp_path, every=every, last=last, shown=Shown(LABELS, count, kwargs, batch_size=2), judge=judge,
    )  # fmt: skip


def images_of(pipe, plan, count=3):
    with attach(pipe, plan):
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        made = pipe(class_labels=[3, 4, 3][:count], generator=generators, output_type="np").images
    return torch.from_numpy((made * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("lora", [None, LoraSetting(2, 3.0)])
@pytest.mark.parametrize("average", [False, True])
def test_it_shows_what_the_deployed_student_samples(lora, average, tmp_path):
    pipe = tiny_dit()
    own = pipe.transformer
    team = trained(pipe, "transformer", lora, average)
    watch = validation(tmp_path, pipe, team)
    assert watch(1) == {}
    assert watch(3) == {}
    values = watch(4)
    assert pipe.transformer is own
    teacher = images_of(tiny_dit(), TEACHER)
    for steps in (1, 2):
        plan = METHOD.plan(team.process, steps)
        with team.roles.use("average" if average else "student", grad=False, frozen=True) as network:
            pipe.transformer = network
            wanted = psnr(images_of(pipe, deployed_plan(pipe, network, METHOD, plan)), teacher)
            pipe.transformer = own
        # batches of two and of three round apart
        assert values[f"validation/psnr/{steps}"] == pytest.approx(wanted.mean().item(), abs=0.02)
        assert values[f"validation/psnr_se/{steps}"] == pytest.approx((wanted.std() / 3**0.5).item(), abs=0.02)
    assert set(values) == {f"validation/psnr{se}/{steps}" for se in ("", "_se") for steps in (1, 2)}
    with Image.open(tmp_path / "validation" / "step-000004.png") as picture:
        assert picture.size[1] > 3 * 96


def test_the_last_update_is_always_looked_at(tmp_path):
    pipe = tiny_dit()
    watch = validation(tmp_path, pipe, trained(pipe, "transformer"), every=4, last=5)
    assert [step for step in range(1, 6) if watch(step)] == [4, 5]


def train(folder, validated, resume=None, stop=None):
    """Tensors of a short training; pictures where validated."""
    pipe = tiny_dit()
    team = trained(pipe, "transformer", LoraSetting(2, 3.0, dropout=0.3))
    settings = options(folder, stop or 4, train_batch_size=2, resume_from_checkpoint=resume, checkpointing_steps=2)
    accelerator = fresh_accelerator(settings)
    watch = validation(folder, pipe, team, 1, 4, accelerator=accelerator) if validated else lambda step: {}
    Loop(METHOD, team, TinySource(), settings, accelerator, watch).run()
    return team.state()


def test_training_does_not_notice_and_a_resumed_run_shows_the_same(tmp_path):
    plain = train(tmp_path / "plain", False)
    watched = train(tmp_path / "watched", True)
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    train(tmp_path / "resumed", True, stop=2)
    before = (tmp_path / "resumed" / "validation" / "step-000001.png").read_bytes()
    train(tmp_path / "resumed", True, resume="latest")
    for step in range(1, 5):
        name = f"validation/step-{step:06d}.png"
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "watched" / name).read_bytes()
    assert before == (tmp_path / "watched" / "validation" / "step-000001.png").read_bytes()
    logged = [list(RunLog(tmp_path / name).lines()) for name in ("watched", "resumed")]
    psnrs = [[line["validation/psnr/2"] for line in lines] for lines in logged]
    assert psnrs[0] == psnrs[1]
    assert len(set(psnrs[0])) > 1


def test_real_images_and_features_where_they_are_known(tmp_path):
    pipe = tiny_dit()
    team = trained(pipe, "transformer")
    values = validation(tmp_path, pipe, team, judge=Judge(ToyNet(), real_images(), 6), steps=(1,))(2)
    names = {"psnr", "feature_distance", "fd_toy"}
    assert set(values) == {f"validation/{name}{se}/1" for name in names for se in ("", "_se")}
    assert all(np.isfinite(value) for value in values.values())
    assert values["validation/fd_toy/1"] > 0
    without = validation(tmp_path, pipe, team, judge=Judge(ToyNet()), steps=(1,))(2)
    assert "validation/fd_toy/1" not in without
    assert without["validation/psnr/1"] == values["validation/psnr/1"]


def test_weights_of_a_wider_type_are_cast_to_the_pipelines(tmp_path):
    pipe = tiny_dit().to(torch.bfloat16)
    team = trained(pipe, "transformer")
    assert next(iter(team.trainable("student").values())).dtype == torch.float32
    with warnings.catch_warnings(action="error"):
        values = validation(tmp_path, pipe, team)(2)
    assert np.isfinite(values["validation/psnr/1"])


def test_a_validation_that_fails_warns_and_training_goes_on(tmp_path):
    pipe = tiny_dit()
    team = trained(pipe, "transformer")
    with torch.no_grad():
        team.trainable("student")["proj_out_2.bias"][0] = float("nan")
    watch = validation(tmp_path, pipe, team)
    own = pipe.transformer
    with pytest.warns(UserWarning, match="the validation after update 2 failed, training goes on: .* NaN or infinity"):
        assert watch(2) == {}
    assert pipe.transformer is own
    assert not list(tmp_path.glob("validation/*.png"))


def test_the_callers_guidance_gives_way_to_the_plans(tmp_path):
    pipe = tiny_dit()
    team = trained(pipe, "transformer")
    plain = validation(tmp_path, pipe, team)(2)
    told = validation(tmp_path, pipe, team, guidance_scale=4.0, num_inference_steps=9)(2)
    assert plain["validation/psnr/1"] == pytest.approx(told["validation/psnr/1"], abs=5)  # only the teacher differs


def test_trackers_are_handed_the_picture(tmp_path):
    seen = {}

    def tracker(name):
        return SimpleNamespace(
            name=name, log_images=lambda values, step, **more: seen.update({name: (values, step, more)})
        )

    pipe = tiny_dit()
    team = trained(pipe, "transformer")
    accelerator = fresh_accelerator(options(tmp_path))
    accelerator.trackers = [tracker("tensorboard"), tracker("wandb"), tracker("aim"), SimpleNamespace(name="mlflow")]
    validation(tmp_path, pipe, team, accelerator=accelerator)(2)
    with Image.open(tmp_path / "validation" / "step-000002.png") as picture:
        pixels = np.asarray(picture)
    assert np.array_equal(seen["tensorboard"][0]["validation"][0], pixels)
    assert seen["tensorboard"][1:] == (2, {"dataformats": "NHWC"})
    assert np.array_equal(seen["wandb"][0]["validation"][0], pixels)
    assert np.array_equal(seen["aim"][0]["validation"], pixels)


def test_pictures_hold_every_pixel_of_small_images():
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    picture = np.asarray(
        labelled_rows("title", ["one", "a head that is far too long"], [Row("row", ("note",), images)])
    )
    factor = 96 // 8
    wanted = images[1, 0].repeat_interleave(factor, 0).repeat_interleave(factor, 1).numpy()
    found = picture[-14 - 96 : -14, -14 - 96 : -14, 0]
    assert np.array_equal(found, wanted)


def test_the_bar_counts_a_resumed_run_from_where_it_goes_on(monkeypatch):
    done = []
    monkeypatch.setattr(Meter, "advance", lambda self, work: done.append(work))
    monkeypatch.setattr(Meter, "begin", lambda self, what, work: done.append(("begin", work)))
    with meter(Console(), False) as bar:
        watch = training_bar(bar, 10)
        assert [watch(step) for step in (7, 8, 9, 10)] == [{}] * 4
    assert done == [("begin", 10), ("begin", 4), 1, 1, 1, 1]


def test_watches_are_joined():
    assert together(lambda step: {"a": step}, lambda step: {}, lambda step: {"b": 2.0})(3) == {"a": 3, "b": 2.0}


def test_plots_show_terms_norms_and_scores(tmp_path):
    log = RunLog(tmp_path)
    assert write_plots(tmp_path) is None
    for step in range(1, 9):
        values = {"train/student/match": 1 / step, "train/fake/follow": 2.0, "grad_norm/student": 1.0, "seconds": 0.1}
        if step % 4 == 0:
            values |= {"validation/psnr/4": 20.0, "validation/psnr_se/4": 0.5, "validation/psnr/1": float("nan")}
        log.append(step, values)
    panels = _panels(log.lines())
    assert [panel.title for panel in panels] == ["fake: follow", "student: match", "gradient norms", "psnr"]
    assert panels[1].curves == {"match": (list(range(1, 9)), [1 / step for step in range(1, 9)], [0.0] * 8)}
    assert panels[3].curves == {"4 steps": ([4, 8], [20.0, 20.0], [0.5, 0.5])}
    with Image.open(write_plots(tmp_path)) as picture:
        assert picture.size[0] > picture.size[1] > 400


def test_smoothing_keeps_the_mean_of_a_window():
    values = np.arange(200.0)
    assert np.allclose(_smoothed(values)[2:-2], values[2:-2])  # of a line, the line
    assert _smoothed(values)[0] == values[:3].mean()


def test_bad_settings():
    with pytest.raises(InputError, match="at least 1 image, in batches of at least 1; got 0 and 16"):
        Shown(LABELS, 0)
