"""Everything the README shows runs, and what it lists is what there is."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import call_arguments, tiny_dit, tiny_unet

from fewstep.distill import METHODS, Batch, LoraSetting, Moment
from fewstep.distill.encode import encode
from fewstep.distill.team import make_team
from fewstep.eval.assets import demo_names
from fewstep.eval.shares import Shares
from fewstep.eval.timing import Spread, Throughput, Timing
from fewstep.samplers import CACHES, ModuleRows, Plan, Process, attach
from fewstep.samplers.correction import CORRECTIONS
from fewstep.samplers.grid import GRIDS
from fewstep.samplers.tokens import UNMASKS
from fewstep.scripts import cli, tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NEEDS_THE_USER = ("PATH", "REAL", "WEIGHTS")
"Words of a command that stand for something of the reader's; such a command is parsed and not run."


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.strip().split("\n")]
    lines += re.findall(r"`(fewstep bench [^`]+)`", README)
    return [line for line in lines if line.startswith("fewstep ")]


def test_the_table_is_the_generated_one():
    assert tables.renewed(README) == README, "run python -m fewstep.scripts.tables"


def test_the_two_commands_are_the_ones_that_continuous_integration_runs():
    run = (ROOT / ".ci" / "run").read_text()
    for words in ("-m venv", 'pip" install', '-e ".[dev]"', "-m pytest -n 2\n", 'fewstep" bench'):
        assert words in run
    main, test = (line for line in "".join(blocks("bash")).split("\n") if line.startswith("python3 -m venv"))
    assert main.endswith("install . && .venv/bin/fewstep bench")
    assert test.endswith('install -e ".[dev]" && .venv/bin/python -m pytest -n 2')
    assert ".venv/bin/python -m pytest -n 2\n" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_files_that_it_names_exist():
    for name in re.findall(r"\]\(([^)h#][^)]*)\)", README):
        assert (ROOT / name).is_file(), name


def called_once(singles, many, *, batch_size, weights_bytes, **_):
    """A timing by no clock of one call with one sample and one with a batch: repeats are most of a small bench."""
    next(iter(singles))()
    many()
    throughput = Throughput(batch_size, 1.0, (1.0,))
    return Timing(1.0, Spread.of([1.0]), throughput, Shares(0, 1, 0, 0, 1), None, 1, "rss", weights_bytes, 1)


def test_the_python_example_and_the_commands_after_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module in ("timing", "tokens.timing"):
        monkeypatch.setattr(f"fewstep.eval.{module}.measure_calls", called_once)
    assert "demo:fashion-dit" in demo_names()
    names = {}
    patterns = (r"10\.0", r"9\.0", r"ModuleRows\(.* skipped=\d+\) \d+", r"[a-d]{4} \d+ \d+ (True|False)")
    for example, printed in zip(blocks("python"), patterns, strict=True):
        exec(compile(example, "README.md", "exec"), names)
        assert re.search(f"{printed}$", capsys.readouterr().out.strip())
    assert Plan.load("my-five.json").nominal_steps == 5
    for command in commands():
        words = shlex.split(command)[1:]
        if any(word in NEEDS_THE_USER for word in words):
            continue
        if words[0] == "bench":
            pipe = words[words.index("--pipe") + 1] if "--pipe" in words else "demo"
            words = [*words[: words.index("--n")], "--n", "8", "--timing_repeats", "1", "--batch_size", "4"]
            words += ["--gen_length", "8"] if pipe == "demo:tokens" else ["--steps", "2"]
            words += ["--out", f"out-{pipe.replace(':', '-')}"]
        if words[:2] == ["search", "start"]:
            words += ["--n", "8"]
        if words[:2] == ["search", "--steps"]:
            few = {"steps": 2, "n": 4, "trials": 2, "confirm": 1, "fresh_n": 4}
            words += [word for flag, value in few.items() for word in (f"--{flag}", str(value))]
            words += ["--objective", "relative_error", "--teacher", "my-five.json"]
        if words[:2] in (["search", "recipe"], ["search", "token-filter"]):
            words += ["--n", "8", "--gen_length", "8", "--limits", "nfe<=8"]
            words += ["--steps", "10", "--length", "8"] if words[1] == "token-filter" else []
        if words[0] == "distill":
            few = {"teacher_samples": 4, "train_batch_size": 2, "max_train_steps": 2, "num_validation_images": 0}
            words += [word for flag, value in few.items() for word in (f"--{flag}", str(value))]
            words += ["--teacher", "my-five.json"]
        assert cli.main(words) == 0, command
    assert (tmp_path / "student.png").is_file()
    assert (tmp_path / "grid.png").is_file()
    assert list(tmp_path.glob("out-*/report.html"))


def test_the_methods_that_the_guide_adds_run(monkeypatch):
    for registry in (GRIDS, CORRECTIONS, CACHES, METHODS, UNMASKS):
        monkeypatch.setattr(registry, "_table", dict(registry._table))
    names = {}
    for example in blocks("python", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        exec(compile(example, "CONTRIBUTING.md", "exec"), names)
    pipe, seen = tiny_unet(), []
    grid = {"type": "cosine", "steps": 3}
    for bound in (1e6, 0.1):
        plan = Plan(grid=grid, correction={"type": "static-threshold", "bound": bound})
        with attach(pipe, plan) as handle:
            seen.append(pipe(**call_arguments(pipe)).images)
        assert [step.timestep for step in handle.stats.steps] == pytest.approx([999, 999 * 0.75**0.5, 499.5])
    with attach(pipe, Plan(grid=grid)):
        np.testing.assert_allclose(seen[0], pipe(**call_arguments(pipe)).images, atol=1e-5)
    assert abs(2 * seen[1] - 1).max() <= 0.1 + 1e-5, "the last step lands on the clipped sample"
    with attach(pipe, Plan(grid=grid, caches=[{"type": "lazy-middle"}])) as handle:
        pipe(**call_arguments(pipe))
    assert handle.stats.modules == {"unet.mid_block": ModuleRows(calls=2, run=4, skipped=2)}
    distilled(METHODS["one-guess"](low=0.9))


def distilled(method):
    """Asks a method of the guide for its roles, its losses and its plan."""
    pipe = tiny_dit()
    process = Process.from_scheduler(pipe.scheduler)
    condition = encode(pipe, {"class_labels": [1, 2], "guidance_scale": 2.0})
    team = make_team(pipe.transformer, process, method, LoraSetting(rank=2, alpha=2.0), guidance=2.0)
    batch = Batch(torch.arange(2), condition, x0=torch.zeros(2, 4, 4, 4))
    moment = Moment(step=0, turn=0, stage=0, stage_step=0, updates=("student",), seed=0, positions=range(2))
    (loss,) = method.losses(batch, team, moment)
    loss.value.mean().backward()
    assert all(parameter.grad is not None for parameter in team.trainable("student").values())
    sampled = tiny_dit()
    with attach(sampled, method.plan(process, 4)) as handle:
        sampled(class_labels=[1], output_type="np")
    assert [step.timestep for step in handle.stats.steps] == [999, 749, 499, 249]


@pytest.mark.parametrize("command", [c for c in commands() if any(w in NEEDS_THE_USER for w in shlex.split(c))])
def test_commands_with_the_readers_own_files_parse(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a shoe\n")
    Plan(name="mine").save("my-five.json")
    words = shlex.split(command)[1:]
    cli.make_parser(words).parse_args(words)
