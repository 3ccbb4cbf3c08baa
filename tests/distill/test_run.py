"""A distillation from end to end: a pipeline in a folder becomes a student in a folder, whatever comes between."""

import json
import os
import signal
import tempfile

import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from PIL import Image
from small_runs import assert_same_roles, roles_in
from test_model_card import sd_with_text

from fewstep.distill import course
from fewstep.distill.encoder import Encoder
from fewstep.distill.latents import Latents
from fewstep.distill.loop import Loop
from fewstep.distill.method import METHODS
from fewstep.distill.options import DistillOptions
from fewstep.distill.pairs import Pairs
from fewstep.distill.run import distill
from fewstep.distill.sources import Batches
from fewstep.samplers import Plan, attach
from fewstep.samplers.errors import InputError
from fewstep.samplers.files import read_tensors

FULL = "transformer/diffusion_pytorch_model.safetensors"
ADAPTER = "adapter_model.safetensors"


def fed(given, name):
    """Hyper-parameters and options that feed a method, and the file of its student."""
    return {
        "lcm": ({"grid_steps": 8}, {"train_data_dir": given.images, "class_labels": ()}, FULL),
        "lcm-lora": ({"grid_steps": 8}, {"train_data_dir": given.images, "lora_rank": 2}, ADAPTER),
        "swiftbrush": ({"fake_rank": 2}, {"lora_rank": 2}, ADAPTER),
        "reflow": ({}, {"teacher_samples": 5}, FULL),
    }[name]


@pytest.mark.parametrize("name", ["lcm", "swiftbrush", "reflow"])
def test_a_run_leaves_a_student_that_its_plan_samples(name, given, tmp_path):
    hyper, data, weights = fed(given, name)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    outcome = given.run(name, whole, hyper, num_validation_images=1, validation_steps=2, **data)
    assert (outcome.step, outcome.stopped_by) == (3, None)
    for each in (weights, "plan.json", "README.md", "run.json", "log.jsonl", "checkpoint-2", "checkpoint-3"):
        assert (whole / each).exists(), each
    for picture in ("losses.png", "validation/step-000002.png", "validation/step-000003.png"):
        with Image.open(whole / picture) as image:
            assert image.size[0] > 100
    facts = json.loads((whole / "run.json").read_text())
    assert (facts["method"]["type"], facts["updates"], facts["global_batch"]) == (name, 3, 3)
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert facts["seconds"] == pytest.approx(sum(line["seconds"] for line in lines))

    pipe = DiTPipeline.from_pretrained(given.pipe)
    pipe.set_progress_bar_config(disable=True)
    plan = Plan.load(whole / "plan.json")
    with attach(pipe, plan) as fast:
        pipe(class_labels=[1], generator=torch.Generator().manual_seed(0), output_type="np")
    assert fast.warnings == ()
    assert fast.stats.nfe == plan.tuned_for.steps == (1 if name == "swiftbrush" else 4)

    given.run(name, parts, hyper, 2, **data)
    given.run(name, parts, hyper, 3, resume_from_checkpoint="latest", **data)
    assert_same_roles(whole / "checkpoint-3", parts / "checkpoint-3")
    assert (whole / weights).read_bytes() == (parts / weights).read_bytes()


def test_the_student_is_what_was_trained(given, tmp_path):
    given.run("reflow", tmp_path, {}, 1, teacher_samples=3)
    student, _ = read_tensors(tmp_path / FULL)
    roles = roles_in(tmp_path / "checkpoint-1")
    assert {f"student/{name}" for name in student} == roles.keys()
    teacher, _ = read_tensors(given.pipe / FULL)
    assert all(torch.equal(value, roles[f"student/{name}"]) for name, value in student.items())
    assert any(not torch.equal(value, teacher[name]) for name, value in student.items())


def test_an_average_is_what_ships(given, tmp_path):
    given.run("reflow", tmp_path, {}, 2, teacher_samples=3, use_ema=True, ema_decay=0.5)
    exported, _ = read_tensors(tmp_path / FULL)
    roles = roles_in(tmp_path / "checkpoint-2")
    assert all(torch.equal(value, roles[f"average/{name}"]) for name, value in exported.items())
    assert any(not torch.equal(value, roles[f"student/{name}"]) for name, value in exported.items())
    assert "averaged over the run" in (tmp_path / "README.md").read_text()


def test_two_students_ship_both(given, tmp_path):
    given.run(
        "icd", tmp_path, {"grid_steps": 6, "segments": 2}, 1, train_data_dir=given.images, lora_rank=2, lora_alpha=3.0
    )
    roles = roles_in(tmp_path / "checkpoint-1")
    for role, folder in (("student", tmp_path), ("forward_student", tmp_path / "forward_student")):
        tensors, _ = read_tensors(folder / ADAPTER)
        named = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
        assert named.keys() == {key.partition("/")[2] for key in roles if key.startswith(f"{role}/")}
        assert all(torch.equal(value, roles[f"{role}/{name}"]) for name, value in named.items())
        assert (folder / "README.md").is_file()
    assert Plan.load(tmp_path / "plan.json").tuned_for.steps == 2


def test_a_signal_leaves_a_checkpoint_that_goes_on(given, tmp_path, monkeypatch):
    hyper, data, weights = fed(given, "lcm-lora")
    given.run("lcm-lora", tmp_path / "whole", hyper, **data)
    batch = Batches.batch

    def interrupted(self, index, positions):
        if index == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, index, positions)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "batch", interrupted)
        outcome = given.run("lcm-lora", tmp_path / "cut", hyper, **data)
    assert (outcome.stopped_by, outcome.checkpoint) == ("SIGTERM", tmp_path / "cut" / "checkpoint-1")
    assert not (tmp_path / "cut" / "plan.json").exists()
    given.run("lcm-lora", tmp_path / "cut", hyper, resume_from_checkpoint="latest", **data)
    assert_same_roles(tmp_path / "whole" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "cut" / weights).read_bytes()


def test_a_finished_run_only_writes_its_student_again(given, tmp_path, monkeypatch):
    hyper, data, weights = fed(given, "swiftbrush")
    given.run("swiftbrush", tmp_path, hyper, 1, **data)
    kept, log = (tmp_path / weights).read_bytes(), (tmp_path / "log.jsonl").read_bytes()
    for name in (weights, "plan.json", "README.md"):
        (tmp_path / name).unlink()
    monkeypatch.setattr(Loop, "_turn", None)
    given.run("swiftbrush", tmp_path, hyper, 1, resume_from_checkpoint="latest", **data)
    assert (tmp_path / weights).read_bytes() == kept
    assert (tmp_path / "log.jsonl").read_bytes() == log
    assert Plan.load(tmp_path / "plan.json").tuned_for.steps == 1


@pytest.mark.parametrize("name", ["lcm", "reflow", "progressive"])
def test_a_dry_run_leaves_nothing(name, given, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    hyper, data, _ = fed(given, name) if name != "progressive" else ({"teacher_steps": 4}, {"teacher_samples": 100}, "")
    outcome = given.run(name, tmp_path / "out", hyper, 10_000, dry_run=True, **data)
    assert outcome.step == 2
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert list(scratch.iterdir()) == []


@pytest.fixture
def no_work(monkeypatch):
    """Fails where images, prompts or samples would be encoded or made."""
    for kind in (Latents, Pairs, Encoder):
        monkeypatch.setattr(kind, "make", None)


BEFORE_LOADING = {
    "no data": ("lcm", {}, {}, "lcm needs data; give --train_data_dir, --dataset_name, or --teacher_samples"),
    "pairs of data": ("reflow", {}, {"train_data_dir": "images"}, "reflow needs pairs .* give --teacher_samples; a da"),
    "no such images": ("lcm", {}, {"train_data_dir": "nowhere"}, "--train_data_dir nowhere does not exist; give a fol"),
    "kohya": ("reflow", {}, {"teacher_samples": 2, "kohya": True}, "--kohya is for adapters, and this student has all"),
    "no adapter": ("reflow", {}, {"teacher_samples": 2, "lora_alpha": 2.0}, "need an adapter; give --lora_rank"),
    "8 bit": ("reflow", {}, {"teacher_samples": 2, "use_8bit_adam": True, "optimizer": "radam"}, "--use_8bit_adam is"),
    "token": (
        "reflow", {}, {"teacher_samples": 2, "hub_token": "x", "report_to": "tensorboard,wandb"},
        "--hub_token would be logged by --report_to tensorboard,wandb; log in with `hf auth login` and leave it out",
    ),
    "tracker": ("reflow", {}, {"teacher_samples": 2, "report_to": "paper"}, "--report_to paper is no tracker"),
    "real images": ("reflow", {}, {"teacher_samples": 2, "validation_n": 9}, "--validation_n needs real images, which"),
    "progressive": (
        "progressive", {"teacher_steps": 8, "stage_steps": 5}, {"teacher_samples": 2},
        "progressive needs --max_train_steps 15 or more with these stages; got 3, so give more, or fewer --stage_steps",
    ),
    "tscd": ("tscd", {"segments": (4, 2), "stage_steps": 3}, {"teacher_samples": 2}, "tscd needs --max_train_steps 4 "),
}  # fmt: skip


@pytest.mark.parametrize("case", BEFORE_LOADING)
def test_what_can_be_refused_before_the_pipeline_is_loaded_is(case, given, tmp_path, monkeypatch):
    name, hyper, changes, words = BEFORE_LOADING[case]
    if changes.get("train_data_dir") == "images":
        changes = changes | {"train_data_dir": given.images}
    monkeypatch.setattr(course, "load_pipeline", None)
    with pytest.raises(InputError, match=words):
        given.run(name, tmp_path / "out", hyper, **changes)


WINDOW = {"type": "guidance", "scale": 2.0, "window": [0, 0.5]}
EDM = {"type": "diffusers", "scheduler": "EDMEulerScheduler"}
BEFORE_WORK = {
    "steps": ("swiftbrush", {}, {"num_inference_steps": 4}, "swiftbrush trains a student of 1 step; it cannot be"),
    "steps to look at": (
        "pcm", {"phases": 2}, {"teacher_samples": 2, "validation_num_inference_steps": (2, 3)}, "student of 2 phases"
    ),
    "embedding": ("guided", {}, {"teacher_samples": 2}, "has no input for the guidance scale; set embed_guid"),
    "layers": ("lcm-lora", {}, {"teacher_samples": 2, "lora_targets": ("to_x",)}, "layer of .* 'to_x'; did you mean "),
    "labels": ("lcm", {}, {"teacher_samples": 2, "class_labels": ()}, "DiTPipeline names no labels; give them as"),
    "no such label": ("lcm", {}, {"teacher_samples": 2, "class_labels": (7, 2000)}, "0 to 1000; got the label 2000"),
    "prompts": ("lcm", {}, {"teacher_samples": 2, "prompts": "some.txt"}, "DiTPipeline takes no prompts; leave"),
    "argument": ("lcm", {}, {"teacher_samples": 2, "call_kwargs": ("widht=8",)}, "unknown argument of DiTPipeline 'wi"),
    "pipe": ("lcm", {}, {"teacher_samples": 2, "pipe": "nowhere"}, "--pipe nowhere is not a folder; give a diffusers"),
    "start": (
        "reflow", {}, {"teacher_samples": 2, "teacher": {"start": {"type": "mid", "timestep": 500.0}}}, "start"
    ),
    "schedule": (
        "lcm", {}, {"teacher_samples": 2, "teacher": {"guidance": WINDOW}},
        "the guidance 'guidance' of the teacher's plan changes over the steps; a student learns one scale, so give",
    ),
    "rescale": (
        "lcm", {}, {"teacher_samples": 2, "teacher": {"guidance": {"type": "constant", "scale": 2.0, "rescale": 0.5}}},
        "the teacher's plan rescales its guidance, which a student does not learn; leave rescale out",
    ),
    "solver": (
        "lcm", {}, {"teacher_samples": 2, "teacher": {"solver": EDM}},
        "EDMEulerScheduler",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BEFORE_WORK)
def test_what_can_be_refused_before_data_are_encoded_is(case, given, tmp_path, no_work):
    name, hyper, changes, words = BEFORE_WORK[case]
    if isinstance(changes.get("teacher"), dict):
        file = tmp_path / "plan.json"
        file.write_text(json.dumps({"fewstep_plan": 1, **changes["teacher"]}))
        changes = changes | {"teacher": file}
    with pytest.raises(InputError, match=words) as caught:
        given.run(name, tmp_path / "out", hyper, **changes)
    assert "\n" not in str(caught.value)


def test_a_run_that_is_resumed_otherwise_is_refused_before_its_data_are_encoded(given, tmp_path, no_work, monkeypatch):
    hyper, data, _ = fed(given, "swiftbrush")
    with monkeypatch.context() as patch:
        patch.undo()
        patch.setattr(Encoder, "make", lambda self, *arguments: None)
        given.run("swiftbrush", tmp_path, hyper, 2, **data)
    mend = "; use the same or start anew in another --output_dir"

    def refused(name, hyper, **changes):
        with pytest.raises(InputError) as caught:
            given.run(name, tmp_path, hyper, **{"updates": 3, "resume_from_checkpoint": "latest"} | changes)
        return str(caught.value)

    saved = f"{tmp_path / 'checkpoint-2'} was written with "
    assert refused("sim", {}) == f"{saved}method.type = swiftbrush, this run has sim{mend}"
    assert refused("swiftbrush", {"fake_rank": 3}, **data) == f"{saved}method.fake_rank = 2, this run has 3{mend}"
    assert refused("swiftbrush", hyper, lora_rank=4) == f"{saved}lora.alpha = 2.0, this run has 4.0{mend}"
    assert refused("swiftbrush", hyper, lora_rank=2, lora_alpha=1.0).startswith(f"{saved}lora.alpha = 2.0, this run h")
    assert refused("swiftbrush", hyper, train_batch_size=2, **data).startswith(f"{saved}global_batch = 3, this run has")
    assert refused("swiftbrush", hyper, teacher=None, **data).startswith(f"{saved}guidance = 2.0, this run has 4.0")
    assert refused("swiftbrush", hyper, updates=1, **data).endswith(
        "is later than --max_train_steps 1; give at least 2"
    )
    assert "holds checkpoint-2 of an earlier run; add --resume_from_checkpoint latest or" in refused(
        "swiftbrush", hyper, resume_from_checkpoint=None, **data
    )


def test_steps_are_those_that_the_method_trains_where_none_are_asked_for(given):
    pipe = DiTPipeline.from_pretrained(given.pipe)
    process = course.Process.from_scheduler(pipe.scheduler)
    options = DistillOptions(output_dir="x")

    def first(name, **hyper):
        return next(iter(course.student_plans(METHODS[name](**hyper), options, process)))

    assert first("lcm") == first("guided", embed_guidance=False) == 4
    assert first("lcm", grid_steps=2) == 2
    assert first("swiftbrush") == 1
    assert first("pcm", phases=6, grid_steps=60) == 6
    assert first("progressive", teacher_steps=64, final_steps=32) == 32


def test_a_result_can_be_quiet_and_is_returned(given, tmp_path, capsys):
    hyper, data, _ = fed(given, "reflow")
    distill(METHODS["reflow"](**hyper), DistillOptions(**given.options(tmp_path, 1, **data)))
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Folders of a tiny Stable Diffusion that reads prompts, and of images with captions; a file of prompts."""
    folder = tmp_path_factory.mktemp("reader")
    sd_with_text().save_pretrained(folder / "pipe")
    (folder / "images").mkdir()
    for number, caption in enumerate(("a shoe", "a")):
        Image.new("RGB", (16, 16), (80 * number, 9, 9)).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(caption)
    (folder / "prompts.txt").write_text("a shoe\nshoe\n")
    return folder


WITH_PROMPTS = {
    "lcm-lora": ({"grid_steps": 8}, {"train_data_dir": "images", "lora_rank": 2}),
    "swiftbrush": ({"fake_rank": 2}, {"prompts": "prompts.txt"}),
    "guided": ({}, {"teacher_samples": 3, "prompts": "prompts.txt"}),
}


@pytest.mark.parametrize("name", WITH_PROMPTS)
def test_a_pipeline_that_reads_prompts(name, given, reader, tmp_path):
    hyper, data = WITH_PROMPTS[name]
    data = {key: reader / value if isinstance(value, str) else value for key, value in data.items()}
    more = {"pipe": str(reader / "pipe"), "class_labels": (), "num_validation_images": 1, "train_batch_size": 2}
    given.run(name, tmp_path, hyper, 2, **data, **more)
    assert (tmp_path / "validation" / "step-000002.png").is_file()
    assert "a shoe" in (tmp_path / "README.md").read_text()
    pipe = DiffusionPipeline.from_pretrained(reader / "pipe")
    pipe.set_progress_bar_config(disable=True)
    plan = Plan.load(tmp_path / "plan.json")
    with attach(pipe, plan) as fast:
        pipe("a shoe", generator=torch.Generator().manual_seed(0), output_type="np")
    assert fast.warnings == ()
    assert fast.stats.nfe == plan.tuned_for.steps
    words = "StableDiffusionPipeline needs prompts; give a text file with one prompt a line as --prompts FILE"
    if "prompts" in data:
        with pytest.raises(InputError, match=words):
            given.run(name, tmp_path / "other", hyper, 2, **data | {"prompts": None}, **more)
