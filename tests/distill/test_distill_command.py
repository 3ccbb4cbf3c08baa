"""``fewstep distill``: its flags, and what it says of bad input."""

import errno
import json
import os
import re
import runpy
import signal
import sys

import pytest
import yaml
from accelerate import Accelerator
from jsonargparse import Namespace
from small_runs import as_flags, assert_same_roles

from fewstep.distill import commandline
from fewstep.distill.__main__ import main as module_main
from fewstep.distill.commandline import method_lines, method_parser
from fewstep.distill.method import METHODS
from fewstep.distill.options import DistillOptions
from fewstep.distill.sources import Batches
from fewstep.samplers import files
from fewstep.scripts.cli import main

METHOD = pytest.mark.parametrize("name", METHODS.names())


def fails(capsys, *arguments, command=main):
    """The only line on standard error of a command that is refused."""
    first = ["distill"] if command is main else []
    assert command([*first, *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    line, *rest = captured.err.splitlines()
    assert rest == []
    assert captured.out.strip() == ""
    return line.removeprefix("fewstep: error: ")


@METHOD
def test_no_field_of_a_method_is_an_option_of_all(name):
    assert not {"config", "print_config", *DistillOptions.model_fields} & (METHODS[name].model_fields.keys() - {"type"})


@METHOD
def test_every_flag_says_what_it_is(name, capsys):
    parser = method_parser(name)
    texts = {action.dest: action.help for action in parser._actions}
    fields = (METHODS[name].model_fields.keys() | DistillOptions.model_fields.keys()) - {"type"}
    assert fields <= texts.keys()
    assert all(texts[field] and texts[field] != field for field in fields)
    with pytest.raises(SystemExit) as ended:
        module_main([name, "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert dict(method_lines())[name] in shown
    assert "--output_dir" in shown
    assert "<class" not in shown


@METHOD
def test_defaults_are_those_of_the_models(name):
    parsed = method_parser(name).parse_args(["--output_dir", "x"])
    assert commandline._read(METHODS[name], parsed) == METHODS[name]()
    assert commandline._read(DistillOptions, parsed) == DistillOptions(output_dir="x")


def test_the_overview_names_all_methods(capsys):
    with pytest.raises(SystemExit) as ended:
        module_main([])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\S", shown, re.MULTILINE) for name in METHODS.names())


@METHOD
def test_a_printed_configuration_is_the_run(name, capsys, tmp_path):
    given = ["--output_dir", "x", "--class_labels", "3", "1", "--learning_rate", "3e-05", "--use_ema", "true"]
    with pytest.raises(SystemExit) as ended:
        method_parser(name).parse_args([*given, "--print_config"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["learning_rate"] == 3e-05
    file = tmp_path / "run.yaml"
    file.write_text(text)
    again = method_parser(name).parse_args(["--config", str(file), "--train_batch_size", "5"])
    wanted = method_parser(name).parse_args([*given, "--train_batch_size", "5"])
    for model in (METHODS[name], DistillOptions):
        assert commandline._read(model, again) == commandline._read(model, wanted)


def test_both_commands_run_the_same(given, tmp_path, capsys):
    for folder, command in (("one", main), ("two", module_main)):
        flags = given.flags(tmp_path / folder, 1, teacher_samples=3)
        assert command([*(["distill"] if command is main else []), "reflow", *flags]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / folder)
    assert_same_roles(tmp_path / "one" / "checkpoint-1", tmp_path / "two" / "checkpoint-1")
    facts = json.loads((tmp_path / "two" / "run.json").read_text())
    assert facts["command"].startswith("python -m fewstep.distill reflow --pipe ")


def test_a_run_of_a_file(given, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    options = given.options(tmp_path / "out", 1, teacher_samples=3, times="logit-normal")
    plain = {name: list(value) if isinstance(value, tuple) else str(value) for name, value in options.items()}
    file.write_text(yaml.safe_dump(plain | {"max_train_steps": 7, "learning_rate": 1e-3, "teacher_samples": 3} | {
        name: options[name] for name in ("train_batch_size", "checkpointing_steps", "encode_batch_size")
    } | {"num_validation_images": 0}))  # fmt: skip
    assert main(["distill", "reflow", "--config", str(file), "--max_train_steps", "1"]) == 0
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (facts["updates"], facts["method"]["times"]) == (1, "logit-normal")


def test_a_dry_run_shows_what_a_run_needs(given, tmp_path, capsys):
    flags = given.flags(tmp_path / "out", 500, teacher_samples=3, dry_run=True, lora_rank=2)
    assert main(["distill", "reflow", *flags]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"student +│ Adapter +│ +\d+ │ +[\d,]+ ", shown)
    assert re.search(r"s an update, [\d.e-]+ hours for 500; [\d,]+ MiB of memory;", shown)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_told_by_the_status(given, tmp_path, capsys, monkeypatch, number, status):
    batch = Batches.batch

    def interrupted(self, index, positions):
        os.kill(os.getpid(), number)
        return batch(self, index, positions)

    monkeypatch.setattr(Batches, "batch", interrupted)
    flags = given.flags(tmp_path, 9, teacher_samples=3)
    assert main(["distill", "reflow", *flags]) == status
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "checkpoint-1")
    assert not (tmp_path / "plan.json").exists()


def test_the_package_is_a_program(given, tmp_path, capsys, monkeypatch):
    arguments = ["reflow", *given.flags(tmp_path / "out", 1, teacher_samples=3, pipe=str(tmp_path))]
    monkeypatch.setattr(sys, "argv", ["fewstep", *arguments])
    monkeypatch.delitem(sys.modules, "fewstep.distill.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("fewstep.distill", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"fewstep: error: --pipe {tmp_path} is not a diffusers pipeline (it holds no model_index.json); "
        "give the folder that save_pretrained wrote\n"
    )


OF_PARSING = {
    "no method": ([], "a command is missing; give one of {adversarial-consistency,cd,"),
    "unknown": (["lmc", "--output_dir", "x"], "unknown method 'lmc'; did you mean 'lcm'? known: adversarial-consist"),
    "no folder": (["lcm"], "the following arguments are required: --output_dir"),
    "unknown flag": (["lcm", "--output_dir", "x", "--gird_steps", "5"], "unrecognized arguments: --gird_steps 5"),
    "type": (["lcm", "--output_dir", "x", "--max_train_steps", "many"], "--max_train_steps: expected int; got many"),
    "range": (["lcm", "--output_dir", "x", "--grid_steps", "0"], "--grid_steps: Input should be greater than or equ"),
    "choice": (
        ["lcm", "--output_dir", "x", "--distance", "z"],
        "--distance: expected one of ['l2', 'l1', 'huber', 'pseudo-huber']; got z",
    ),
    "fields together": (["progressive", "--output_dir", "x", "--teacher_steps", "7"], "--teacher_steps must be final"),
    "three scales": (["lcm", "--output_dir", "x", "--guidance_scale", "1", "2", "3"], "--guidance_scale: Tuple should"),
    "solver": (
        ["cd", "--output_dir", "x", "--solver", "huen"],
        "--solver: unknown solver of the teacher 'huen'; did you m",
    ),
    "two sources": (
        ["lcm", "--output_dir", "x", "--train_data_dir", "a", "--dataset_name", "b"],
        "--train_data_dir and --dataset_name exclude each other; give one",
    ),
    "hub": (["lcm", "--output_dir", "x", "--push_to_hub", "true"], "--push_to_hub needs a repository; give --hub_mod"),
    "no configuration": (["lcm", "--config", "nowhere.yaml"], "--config"),
}


@pytest.mark.parametrize("case", OF_PARSING)
def test_bad_flags_are_refused_in_one_line(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, words = OF_PARSING[case]
    assert words in fails(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []
    if case not in ("no method",):
        assert words in fails(capsys, *arguments, command=module_main).replace("distillation method", "method")


def test_bad_input_is_refused_in_one_line(given, tmp_path, capsys, monkeypatch):
    def said(method, **changes):
        return fails(capsys, method, *given.flags(tmp_path / "out", **changes))

    (tmp_path / "file").write_text("")
    assert said("lcm").startswith("lcm needs data; give --train_data_dir, --dataset_name, or --teacher_samples")
    assert said("lcm", train_data_dir=tmp_path).endswith(
        "holds no images; fewstep reads .png, .jpg, .jpeg, .webp, .bmp"
    )
    assert said("reflow", teacher_samples=2, output_dir=tmp_path / "file").endswith("cannot be written: File exists")
    assert "file/x cannot be written: Not a directory" in said(
        "reflow", teacher_samples=2, output_dir=tmp_path / "file/x"
    )
    assert "file is not valid JSON" in said("reflow", teacher_samples=2, teacher=tmp_path / "file")
    assert "no complete checkpoint" in said("reflow", teacher_samples=2, resume_from_checkpoint="latest")
    assert "is no checkpoint (no state.json)" in said("reflow", teacher_samples=2, resume_from_checkpoint="some")
    assert said("swiftbrush", num_inference_steps=2).endswith("trains a student of 1 step; it cannot be sampled in 2")


@pytest.mark.parametrize("when", ["checkpoint", "export"])
def test_a_full_disk(when, given, tmp_path, capsys, monkeypatch):
    write = files.save_file

    def full(tensors, path, **more):
        if (when == "checkpoint" and "roles" in str(path) and "checkpoint-4" in str(path)) or (
            when == "export" and "adapter_model" in str(path)
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(tensors, path, **more)

    flags = given.flags(tmp_path, 4, teacher_samples=3, lora_rank=2)
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        line = fails(capsys, "reflow", *flags)
    if when == "checkpoint":
        last = tmp_path / "checkpoint-2"
        path = tmp_path / "checkpoint-4"
        assert line == f"cannot write {path}: No space left on device; the last good checkpoint is {last}"
    else:
        assert re.fullmatch(r"cannot write \S+: No space left on device", line)
    assert not (tmp_path / "plan.json").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert main(["distill", "reflow", *flags, "--resume_from_checkpoint", "latest"]) == 0
    assert (tmp_path / "plan.json").is_file()


def test_a_token_is_written_nowhere(given, tmp_path, capsys, monkeypatch):
    tracked, pushed = [], []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config: tracked.append(config))
    monkeypatch.setattr("fewstep.distill.run.push_to_hub", lambda *arguments: pushed.append(arguments))
    to = {"push_to_hub": True, "hub_model_id": "a/b", "hub_token": "hf_x"}
    assert main(["distill", "reflow", *given.flags(tmp_path, 1, teacher_samples=3, **to)]) == 0
    assert pushed == [(tmp_path, "a/b", "hf_x", False)]
    assert tracked[0]["hub_model_id"] == "a/b"
    assert "hf_x" not in tracked[0].values()
    found = [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_x" in path.read_bytes()]
    assert found == []


def test_sequences_of_a_namespace_become_tuples():
    parsed = Namespace(**{name: info.get_default() for name, info in METHODS["tscd"].model_fields.items()})
    parsed.segments = [4, 2]
    assert commandline._read(METHODS["tscd"], parsed).segments == (4, 2)


def test_flags_of_options():
    assert as_flags({"a": (1, 2), "b": True, "c": None}) == ["--a", "1", "2", "--b", "true"]
