import csv
import json
import math
import multiprocessing
import random
import time

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny import tiny_dit, tiny_unet

from fewstep.eval import bench as bench_module
from fewstep.eval import generate
from fewstep.eval.bench import run_bench
from fewstep.eval.features import FEATURE_NETS
from fewstep.eval.options import BenchOptions
from fewstep.eval.quantise import check_uint8
from fewstep.eval.report_runs import load_bench
from fewstep.eval.table import bench_table
from fewstep.eval.timing import Spread
from fewstep.samplers import InputError, Plan

MEASURED = {"latency_s", "latency_q1_s", "latency_q3_s", "images_per_s", "peak_bytes"}
N = 24


class ToyNet:
    """Four fixed random projections of 8x8 grey images, and classes from them."""

    name, dim, channels, preprocess, fingerprint = "toy", 4, (1,), "none", "f" * 64

    def __call__(self, images):
        check_uint8(images, self.channels)
        weights = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return images.flatten(1).float() / 255 @ weights

    def logits_from_features(self, features):
        return features @ torch.randn(4, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setitem(FEATURE_NETS._table, "toy", lambda path, download: ToyNet())
    monkeypatch.setattr(generate, "SHARD_SIZE", 8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved pipelines, and a folder of pictures that stand for real ones."""
    root = tmp_path_factory.mktemp("given")
    tiny_dit().save_pretrained(root / "dit")
    tiny_unet().save_pretrained(root / "unet")
    draw = np.random.default_rng(0)
    (root / "real").mkdir()
    for index in range(40):
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / "real" / f"{index:03d}.png")
    return root


def options(folders, out, pipe="unet", **changes):
    given = {
        "pipe": str(folders / pipe), "out": out, "n": N, "steps": (2,), "reference_steps": 4, "net": "toy",
        "reference_images": folders / "real", "batch_size": 4, "timing_repeats": 1, "device": "cpu",
        **({"class_labels": tuple(range(10))} if pipe == "dit" else {}),
    }  # fmt: skip
    return BenchOptions(**given | changes)


def run(folders, out, **changes):
    return run_bench(options(folders, out, **changes), command="fewstep bench", console=Console(quiet=True))


def quality(out):
    """results.csv without what a clock or the memory says."""
    with (out / "results.csv").open(newline="") as stream:
        return [{key: value for key, value in row.items() if key not in MEASURED} for row in csv.DictReader(stream)]


def record(out, name):
    return json.loads((out / "runs" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """A bench that was not interrupted."""
    patch = pytest.MonkeyPatch()
    patch.setitem(FEATURE_NETS._table, "toy", lambda path, download: ToyNet())
    patch.setattr(generate, "SHARD_SIZE", 8)
    out = run(folders, tmp_path_factory.mktemp("finished") / "out", pipe="dit")
    patch.undo()
    return out


def test_rows_and_files(finished):
    rows = {row["name"]: row for row in quality(finished)}
    assert set(rows) == {"reference-4", "ddim-2", "dpmpp-2m-2", "unipc-2", "euler-2"}
    assert {name: float(row["nfe"]) for name, row in rows.items()} == {
        "reference-4": 8.0, "ddim-2": 4.0, "dpmpp-2m-2": 4.0, "unipc-2": 4.0, "euler-2": 4.0
    }  # fmt: skip
    assert (finished / "report.html").stat().st_size > 1000
    wanted = {
        "pipe",
        "plan",
        "n",
        "config_hash",
        "fd_toy",
        "fd_toy_se",
        "kd_toy",
        "recall_toy",
        "class_accuracy",
        "psnr",
    }
    assert wanted <= set(rows["ddim-2"])
    assert rows["reference-4"]["psnr"] == ""


def test_record_says_everything(finished):
    run = record(finished, "ddim-2")
    assert run["format"] == 1
    assert run["role"] == "baseline"
    assert run["seeds"] == [0, N]
    assert run["n"] == N
    assert run["command"] == "fewstep bench"
    assert run["config"]["plan"]["grid"] == {"type": "spacing", "steps": 2, "spacing": "trailing"}
    assert run["paired"]["against"] == "reference-4"
    assert set(run["paired"]["metrics"]) >= {"fd_toy", "kd_toy", "vendi_toy", "class_accuracy"}
    assert run["metrics"]["fd_toy"]["n"] == N
    assert run["metrics"]["fd_toy"]["net_fingerprint"] == ToyNet.fingerprint
    assert run["metrics"]["fd_toy"]["higher_is_better"] is False
    assert run["metrics"]["coverage_toy"]["higher_is_better"] is True
    assert len(run["worst"]) == 8
    assert run["worst"][0]["feature_distance"] >= run["worst"][-1]["feature_distance"]
    shares = run["timing"]["shares_s"]
    parts = sum(shares[key] for key in ("encode_s", "denoise_s", "decode_s", "other_s"))
    assert math.isclose(parts, shares["total_s"], rel_tol=0.01, abs_tol=5e-4)
    assert record(finished, "reference-4")["paired"] is None


def test_paired_difference_is_the_difference_of_the_values(finished):
    reference, row = record(finished, "reference-4"), record(finished, "euler-2")
    for name, pair in row["paired"]["metrics"].items():
        expected = row["metrics"][name]["value"] - reference["metrics"][name]["value"]
        assert pair["difference"] == pytest.approx(expected, abs=1e-9), name


def test_same_command_again_changes_nothing(folders, finished):
    before = {path: path.read_bytes() for path in sorted(finished.rglob("*")) if path.is_file()}
    run(folders, finished, pipe="dit")
    after = {path: path.read_bytes() for path in sorted(finished.rglob("*")) if path.is_file()}
    assert before == after


def files_in(out):
    return sum(path.is_file() for path in out.rglob("*"))


def test_killed_five_times_and_resumed_gives_the_same_table(folders, finished, tmp_path):
    """SIGKILL when as many files are there as five random numbers say; the child is forked, so it starts at once."""
    out = tmp_path / "out"
    moments = sorted(random.Random(0).sample(range(1, files_in(finished) - 2), 5))
    context = multiprocessing.get_context("fork")
    for moment in moments:
        child = context.Process(target=run, args=(folders, out), kwargs={"pipe": "dit"})
        child.start()
        while child.is_alive() and files_in(out) < moment:
            time.sleep(0.001)
        child.kill()
        child.join()
        assert not (out / "results.csv").exists()
    run(folders, out, pipe="dit")
    assert quality(out) == quality(finished)


def test_interrupt_while_scoring_keeps_what_is_there(folders, finished, tmp_path, monkeypatch):
    out, score = tmp_path / "out", bench_module.Scorer.score
    calls = []

    def interrupted(self, images, reference):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, images, reference)

    monkeypatch.setattr(bench_module.Scorer, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folders, out, pipe="dit")
    assert len(list((out / "runs").iterdir())) == 2
    monkeypatch.undo()
    monkeypatch.setitem(FEATURE_NETS._table, "toy", lambda path, download: ToyNet())
    monkeypatch.setattr(generate, "SHARD_SIZE", 8)
    first = record(out, "reference-4")
    run(folders, out, pipe="dit")
    assert record(out, "reference-4") == first
    assert quality(out) == quality(finished)


def test_batch_size_moves_no_score(folders, finished, tmp_path):
    out = run(folders, tmp_path / "out", pipe="dit", batch_size=7)
    for row, other in zip(quality(out), quality(finished), strict=True):
        assert row["config_hash"] == other["config_hash"]
        assert float(row["kd_toy"]) == pytest.approx(float(other["kd_toy"]), abs=1e-3)


def test_larger_n_extends_and_a_stranger_is_refused(folders, tmp_path):
    out = run(folders, tmp_path / "out")
    shard = next((out / "shards").rglob("shard-00000.safetensors"))
    stamp = shard.stat().st_mtime_ns
    run(folders, out, n=2 * N)
    assert shard.stat().st_mtime_ns == stamp
    assert {row["n"] for row in quality(out)} == {str(2 * N)}
    with pytest.raises(InputError, match="holds runs of other weights or settings"):
        run(folders, out, pipe="dit")


def test_plan_gets_a_control_of_equal_latency(folders, tmp_path, monkeypatch):
    """Five times the reference's latency per step makes a control of five steps."""
    plan = Plan.from_json({"fewstep_plan": 1, "grid": {"type": "explicit", "timesteps": [900, 300]}})
    plan.save(tmp_path / "quick.json")
    real = bench_module.measure

    def measured(pipe, *args, **kwargs):
        timing = real(pipe, *args, **kwargs)
        latency = {"quick": 0.15}.get(name_of(pipe), 0.2)
        return bench_module.dataclasses.replace(timing, latency_s=Spread.of([latency]))

    def name_of(pipe):
        grid = pipe._fewstep_attachment.plan.grid
        return "quick" if grid.type == "explicit" else ""

    monkeypatch.setattr(bench_module, "measure", measured)
    out = run(folders, tmp_path / "out", plans=(tmp_path / "quick.json",))
    assert record(out, "quick")["control"] == "control-own-3"
    assert record(out, "quick")["role"] == "plan"
    assert record(out, "control-own-3")["role"] == "control"
    assert record(out, "control-own-3")["nfe"] == 3
    run(folders, out, plans=(tmp_path / "quick.json",), n=2 * N)
    assert record(out, "control-own-3")["n"] == 2 * N


def test_few_images_have_no_frechet_distance_and_say_so(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(ToyNet, "dim", 13)
    monkeypatch.setattr(ToyNet, "__call__", lambda self, images: images.flatten(1)[:, :13].float() / 255)
    out = run(folders, tmp_path / "out")
    assert "fd_toy" not in quality(out)[0]
    assert float(quality(out)[0]["kd_toy_se"]) > 0
    assert "n = 24 is below 26, twice the 13 dimensions of toy" in record(out, "ddim-2")["warnings"][0]
    with pytest.raises(InputError, match="--metrics fd_toy cannot be computed: a Fréchet distance needs n"):
        run(folders, tmp_path / "other", metrics=("fd_toy",))


def test_without_a_network_rows_are_compared_in_pixels(folders, tmp_path):
    out = run(folders, tmp_path / "out", net=None, reference_images=None, steps=(1, 2))
    solvers = ("ddim", "dpmpp-2m", "unipc", "euler")
    rows = {f"{solver}-{steps}" for solver in solvers for steps in (1, 2)}
    assert {row["name"] for row in quality(out)} == {"reference-4", *rows}
    assert set(record(out, "ddim-2")["metrics"]) == {"psnr"}
    assert "no feature network was given" in record(out, "ddim-2")["warnings"][0]


def test_chosen_metrics_only(folders, tmp_path):
    out = run(folders, tmp_path / "out", metrics=("kd_toy", "psnr"))
    assert set(record(out, "ddim-2")["metrics"]) == {"kd_toy", "psnr"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": ("kd_tyo",)}, "unknown metric 'kd_tyo'; did you mean 'kd_toy'"),
        ({"metrics": ("lpips",)}, "--metrics lpips cannot be computed: it needs the weights of its backbone"),
        ({"metrics": ("class_accuracy",)}, "it needs a network that names classes, and class labels"),
        ({"net": None}, "give it as --net"),
        ({"net": "tyo"}, "unknown feature net 'tyo'; did you mean 'toy'"),
        ({"call_kwargs": ("eta",)}, "is not of the form key=value"),
        ({"call_kwargs": ("generator=1",)}, "must not set generator: it comes from --seed"),
        ({"call_kwargs": ("etta=1",)}, "unknown argument of DDIMPipeline 'etta'; did you mean 'eta'"),
        ({"class_labels": (1,)}, "takes no class labels"),
        ({"n": 4}, "--n must be at least 8; got 4"),
        ({"steps": (0,)}, "--steps must be at least 1; got 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(folders, tmp_path, changes, words):
    with pytest.raises(InputError) as caught:
        run(folders, tmp_path / "out", **changes)
    assert words in str(caught.value)
    assert not list((tmp_path / "out").rglob("shard-*"))


def test_out_that_is_a_file(folders, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match=r"--out .*out cannot be a folder \(File exists\); give another one"):
        run(folders, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_two_plans_of_one_name(folders, tmp_path):
    plan = {"fewstep_plan": 1, "name": "ddim-2", "grid": {"type": "spacing", "steps": 2}}
    (tmp_path / "a.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match="two rows are called 'ddim-2'; give one of the plans another name"):
        run(folders, tmp_path / "out", plans=(tmp_path / "a.json",))


def test_features_of_another_network_are_refused(folders, tmp_path):
    out = run(folders, tmp_path / "out")
    path = next((out / "features").rglob("shard-00001.safetensors"))
    other = next(p for p in (out / "features").rglob("shard-00001.safetensors") if p.parent != path.parent)
    path.write_bytes(other.read_bytes())
    for run_file in (out / "runs").iterdir():
        run_file.unlink()
    with pytest.raises(InputError, match="holds no features of these images by toy; delete it"):
        run(folders, out)


def test_table_shows_as_many_metrics_as_fit(finished):
    bench = load_bench(finished)
    narrow, wide = (bench_table(bench, width) for width in (80, 140))
    assert len(narrow.columns) == 6
    assert len(wide.columns) == 8
    console = Console(width=140, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(wide)
    text = console.export_text()
    assert "reference-4" in text
    assert "fd_toy" in text
