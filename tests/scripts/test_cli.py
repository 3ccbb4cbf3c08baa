import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel
from PIL import Image
from tiny import tiny_scheduler

from fewstep.eval import assets, reference
from fewstep.samplers import Plan
from fewstep.samplers.files import read_tensors, write_tensors
from fewstep.scripts import bench_command, plans_command
from fewstep.scripts.cli import main, make_parser
from fewstep.scripts.sample_command import write_grid

FLAGS = Path(__file__).with_name("cli_flags.json")
SHIPPED = assets.DEMO


@pytest.fixture(scope="module")
def toy_demo(tmp_path_factory):
    """A demo folder with an untrained teacher, one plan, and the real statistics that ship."""
    root = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4, 4),
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=2, attention_head_dim=4,
    )  # fmt: skip
    DDIMPipeline(unet=unet.eval(), scheduler=tiny_scheduler()).save_pretrained(root / "toy")
    shipped = SHIPPED / "fashion-features"
    (root / "fashion-features").mkdir()
    for name in ("train.safetensors", "test.safetensors"):
        (root / "fashion-features" / name).symlink_to(shipped / name)
    real, header = read_tensors(shipped / "real.safetensors")
    write_tensors(root / "fashion-features" / "real.safetensors", {"features": real["features"][:300]}, header)
    plan = {"fewstep_plan": 1, "grid": {"type": "explicit", "timesteps": [900, 400]}}
    ddim = {"type": "diffusers", "scheduler": "DDIMScheduler"}
    steps = {"type": "spacing", "steps": 3, "spacing": "trailing"}
    (root / "plans" / "toy").mkdir(parents=True)
    (root / "plans" / "toy" / "quick.json").write_text(json.dumps(plan | {"solver": ddim}))
    reference_plan = {"fewstep_plan": 1, "name": "ddim-3", "solver": ddim, "grid": steps}
    (root / "plans" / "toy" / "reference.json").write_text(json.dumps(reference_plan))
    return root


@pytest.fixture
def demo(toy_demo, monkeypatch):
    monkeypatch.setattr(assets, "DEMO", toy_demo)
    monkeypatch.setattr(reference, "DEMO", toy_demo)
    return "demo:toy"


def flags():
    """Every command with its flags, their types and defaults."""
    found = {}

    def visit(parser, name):
        table = {}
        for action in parser._actions:
            if hasattr(action, "choices") and action.dest in ("command", "action"):
                for sub, subparser in action._name_parser_map.items():
                    visit(subparser, f"{name} {sub}")
            elif action.dest not in ("help", "print_config", "version"):
                key = action.option_strings[0] if action.option_strings else action.dest
                table[key] = {"default": repr(action.default), "nargs": action.nargs}
        found[name] = table

    visit(make_parser(), "fewstep")
    methods = {name: found.pop(name) for name in sorted(found) if name.startswith("fewstep distill ")}
    shared = set.intersection(*(set(map(repr, table.items())) for table in methods.values()))
    some = next(iter(methods.values()))
    found["fewstep distill *"] = {flag: what for flag, what in some.items() if repr((flag, what)) in shared}
    for name, table in methods.items():
        found[name] = {flag: what for flag, what in table.items() if repr((flag, what)) not in shared}
    return found


def test_flags_are_those_that_were_promised():
    """A changed flag breaks somebody's script: change tests/scripts/cli_flags.json and the changelog with it."""
    assert flags() == json.loads(FLAGS.read_text())


def test_bench_of_a_demo_needs_no_flag_but_its_name(demo, tmp_path, capsys):
    arguments = ["bench", "--pipe", demo, "--n", "260", "--steps", "2", "--out", str(tmp_path), "--device", "cpu"]
    assert main([*arguments, "--timing_repeats", "1"]) == 0
    shown = capsys.readouterr().out
    assert "fd_fashion" in shown
    assert str(tmp_path / "report.html") in shown
    names = {path.stem for path in (tmp_path / "runs").iterdir()}
    assert names >= {"ddim-3", "ddim-2", "dpmpp-2m-2", "unipc-2", "euler-2", "quick"}
    run = json.loads((tmp_path / "runs" / "quick.json").read_text())
    assert run["control"] in names
    assert run["command"].startswith("fewstep bench --pipe demo:toy --n 260")
    teacher = json.loads((tmp_path / "runs" / "ddim-3.json").read_text())
    assert teacher["role"] == "reference"
    assert teacher["floor"]["fd_fashion"]["n"] == 10_000
    assert 0 < teacher["floor"]["fd_fashion"]["value"] < 1 < teacher["metrics"]["fd_fashion"]["value"]
    assert {"kd_fashion", "precision_fashion", "recall_fashion", "density_fashion", "coverage_fashion"} <= set(
        teacher["metrics"]
    )
    assert {"psnr", "ssim", "feature_distance"} <= set(run["metrics"])
    assert (tmp_path / "report.html").is_file()


def test_configuration_file_and_flags_after_it(tmp_path, capsys):
    (tmp_path / "bench.yaml").write_text("n: 512\nsteps: [3, 4]\nplans: [a.json]\n")
    assert_exits_0(["bench", "--config", str(tmp_path / "bench.yaml"), "--n", "99", "--print_config"])
    shown = capsys.readouterr().out
    assert "n: 99" in shown
    assert "- 3\n- 4" in shown
    assert "- a.json" in shown
    (tmp_path / "again.yaml").write_text(shown)
    assert_exits_0(["bench", "--config", str(tmp_path / "again.yaml"), "--print_config"])
    assert capsys.readouterr().out == shown


def assert_exits_0(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--n", "1"], "--n must be at least 8; got 1"),
        (["bench", "--n", "many"], "--n: expected int; got many"),
        (["bench", "--dtype", "float8"], "--dtype: expected one of ['float32', 'float16', 'bfloat16']; got float8"),
        (["bench", "--stepps", "3"], "unrecognized arguments: --stepps 3"),
        (["bench", "--pipe", "/nowhere"], "--pipe /nowhere is not a folder"),
        (["bench", "--plans", "/nowhere.json"], "/nowhere.json does not exist"),
        (["bench", "--config", "/nowhere.yaml"], "--config: File does not exist"),
        (["bench", "--plans", "fashion-dit/5-stp"], "did you mean 'fashion-dit/5-step'"),
        (["sample", "--plan", "."], ". is a folder; give a plan file, such as plan.json"),
        (["sample", "--n", "0"], "--n must be at least 1; got 0"),
        (["sample", "--out", "grid.jpg"], "--out grid.jpg is not a PNG file"),
        (["plans", "show", "fashion"], "unknown plan 'fashion'"),
        (["doctor", "--plan", "fast-dllm"], "fast-dllm is a recipe for token models; give a plan"),
        (["plans", "validate", "."], ". is a folder; give a plan file"),
        ([], "a command is missing; give one of {bench,"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    error = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", captured.err).strip().splitlines()
    assert error[-1].startswith("fewstep: error: ")
    assert words in error[-1]
    assert sum("error" in line for line in error) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_interrupt_says_how_to_continue_and_is_status_130(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_command, "run_bench", interrupted)
    assert main(["bench"]) == 130
    assert "fewstep: stopped; the same command continues where it stopped" in capsys.readouterr().err


def test_sample_writes_a_grid_and_says_what_ran(demo, tmp_path, capsys):
    out = tmp_path / "grid.png"
    assert main(["sample", "--pipe", demo, "--plan", str(plan_of(demo)), "--n", "5", "--out", str(out)]) == 0
    assert "2 network evaluations per image in 2 steps" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.size == (3 * 32, 2 * 32)
        assert picture.mode == "L"
    first = out.read_bytes()
    arguments = ["sample", "--pipe", demo, "--plan", str(plan_of(demo)), "--n", "5", "--out", str(out)]
    assert main([*arguments, "--batch_size", "5"]) == 0
    assert out.read_bytes() == first
    arguments[arguments.index(str(plan_of(demo)))] = f"{demo.removeprefix('demo:')}/quick"  # as fewstep plans ls has it
    assert main(arguments) == 0
    assert out.read_bytes() == first


def plan_of(demo):
    return assets.DEMO / "plans" / demo.removeprefix("demo:") / "quick.json"


def test_sample_in_a_number_of_steps(demo, tmp_path, capsys):
    arguments = ["sample", "--pipe", demo, "--n", "1", "--out", str(tmp_path / "a.png"), "--steps"]
    assert main([*arguments, "1"]) == 0
    assert "1 network evaluation per image in 1 step\n" in capsys.readouterr().out
    arguments.append("4")
    assert main(arguments) == 0
    assert "4 network evaluations per image in 4 steps" in capsys.readouterr().out
    assert main([*arguments, "--plan", str(plan_of(demo))]) == 2
    assert "has a grid of its own; leave --steps out" in capsys.readouterr().err


def test_grid_is_row_by_row(tmp_path):
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
    write_grid(images, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (4, 4)
        assert [picture.getpixel(at) for at in ((0, 0), (2, 0), (0, 2), (2, 2))] == [
            (0, 0, 0), (1, 1, 1), (2, 2, 2), (0, 0, 0)
        ]  # fmt: skip


def test_plans_are_listed_shown_and_validated(demo, tmp_path, capsys):
    assert main(["plans", "ls"]) == 0
    shown = capsys.readouterr().out
    assert "toy/quick" in shown
    assert "toy/reference" in shown
    assert "explicit, rule, spacing" in shown
    assert main(["plans", "show", "toy/quick"]) == 0
    assert json.loads(capsys.readouterr().out)["grid"]["timesteps"] == [900, 400]
    assert main(["plans", "validate", "toy/quick", "toy/reference"]) == 0
    assert "toy/quick: valid" in capsys.readouterr().out
    assert main(["plans", "show", "fast-dllm-dual"]) == 0
    recipe = json.loads(capsys.readouterr().out)
    assert recipe["cache"]["type"] == "dual"
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert main(["plans", "validate", str(tmp_path / "recipe.json")]) == 0
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"unmask": {"type": "threshold", "threshold": 2}}))
    assert main(["plans", "validate", str(tmp_path / "recipe.json")]) == 2
    assert "recipe.json: unmask.threshold" in capsys.readouterr().err
    bad = tmp_path / "bad.json"
    bad.write_text('{"fewstep_plan": 1, "grid": {"type": "explicit", "timesteps": [100, 400]}}')
    assert main(["plans", "validate", "toy/quick", str(bad)]) == 2
    assert "timesteps must decrease; got 100 before 400 at index 1" in capsys.readouterr().err


def test_part_types_are_those_of_the_plan():
    types = plans_command.part_types()
    assert set(types) <= set(Plan.model_fields)
    assert "spacing" in types["grid"]
    assert "diffusers" in types["solver"]
    assert "constant" in types["guidance"]
