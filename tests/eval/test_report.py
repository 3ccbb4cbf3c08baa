"""The report and the table say what the runs say, and nothing that a run smuggles in."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import itertools
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from fabricated import METHODS, fabricate, fabricate_run, garment
from html_page import Page, check_self_contained, words
from PIL import Image

from fewstep.eval import record, shares, timing
from fewstep.eval.pictures import LONGEST_SIDE, find_pictures, picture
from fewstep.eval.plots import Box, ParetoPlot, Point, pareto_front, pareto_svg, place_labels
from fewstep.eval.report import write_csv, write_report
from fewstep.eval.report_runs import (
    Decoding,
    Difference,
    Floor,
    Latency,
    Metric,
    Paired,
    Run,
    Shares,
    Throughput,
    Timing,
    Worst,
    load_bench,
)
from fewstep.eval.verdict import controls, digits, judge, verdict, with_error
from fewstep.samplers.errors import InputError
from fewstep.samplers.files import write_json, write_tensors


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return fabricate(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def html(out) -> str:
    return write_report(out).read_text(encoding="utf-8")


def change(out: Path, row: str, /, **fields: object) -> None:
    path = out / "runs" / f"{row}.json"
    run = json.loads(path.read_text())
    run |= fields
    path.write_text(json.dumps(run))


FEW = (("ddim-50", "reference", 50, 0.0), ("ddim-5", "baseline", 5, 3.0), ("ours-5", "plan", 5, 0.5))


@pytest.mark.parametrize(
    ("read", "written"),
    [
        (Run, record.RunRecord),
        (Metric, record.Metric),
        (Paired, record.Paired),
        (Difference, record.Difference),
        (Floor, record.Floor),
        (Worst, record.Worst),
        (Decoding, record.Decoding),
        (Timing, timing.Timing),
        (Latency, timing.Spread),
        (Throughput, timing.Throughput),
        (Shares, shares.Shares),
    ],
)
def test_the_report_reads_only_what_the_harness_writes(read, written):
    assert set(read.model_fields) <= {field.name for field in dataclasses.fields(written)}


def test_csv_holds_the_numbers_of_the_runs(out):
    lines = list(csv.DictReader(io.StringIO(write_csv(out).read_text())))
    assert len(lines) == len(METHODS)
    for line in lines:
        run = json.loads((out / "runs" / f"{line['name']}.json").read_text())
        assert (line["role"], line["config_hash"]) == (run["role"], run["config_hash"])
        assert (line["pipe"], line["plan"]) == ("demo:fashion-dit", run["name"])
        assert (float(line["nfe"]), int(line["n"])) == (run["nfe"], run["n"])
        for key in {key for key in line if f"{key}_se" in line}:
            score = run["metrics"].get(key)
            assert line[key] == ("" if score is None else repr(score["value"]))
            assert line[f"{key}_se"] == ("" if score is None else repr(score["se"]))
        latency = run["timing"]["latency_s"]
        columns = [float(line[c]) for c in ("latency_s", "latency_q1_s", "latency_q3_s")]
        assert columns == [latency["median"], latency["q1"], latency["q3"]]
        assert float(line["images_per_s"]) == run["timing"]["throughput"]["images_per_s"]
        assert int(line["peak_bytes"]) == run["timing"]["peak_bytes"]
        assert int(line["flops"]) == run["timing"]["flops"]


def test_quality_lines_of_the_csv_do_not_depend_on_timing(tmp_path):
    fabricate(tmp_path, FEW, images=1)
    before = write_csv(tmp_path).read_text().splitlines()
    for factor, (name, *_) in enumerate(FEW, 1):
        spread = {"median": 1.0 / factor, "q1": 1.0 / factor, "q3": 1.0 / factor}
        change(tmp_path, name, timing={"latency_s": spread})
    after = write_csv(tmp_path).read_text().splitlines()
    split = before[0].split(",").index("latency_s")
    assert [line.split(",")[:split] for line in after] == [line.split(",")[:split] for line in before]


def test_csv_disarms_formulas(tmp_path):
    fabricate(tmp_path, FEW[:1], images=1)
    change(tmp_path, "ddim-50", name="=HYPERLINK(1)")
    line = next(csv.DictReader(io.StringIO(write_csv(tmp_path).read_text())))
    assert line["name"] == "'=HYPERLINK(1)"


def test_outputs_are_reproduced_to_the_byte(out, html):
    csv_bytes = write_csv(out).read_bytes()
    assert write_report(out).read_text(encoding="utf-8") == html
    assert write_csv(out).read_bytes() == csv_bytes
    assert not list(out.glob(".*.tmp"))


def test_page_is_self_contained_and_accessible(html):
    check_self_contained(html)


def test_nothing_from_a_run_becomes_markup(tmp_path):
    fabricate(tmp_path, FEW, images=8)
    evil = '<script>alert("1")</script>$x$&\'"></svg>'
    run = json.loads((tmp_path / "runs" / "ours-5.json").read_text())
    score = run["metrics"]["fd_fashion"] | {"net_fingerprint": evil, "reference": evil}
    metrics = {evil: score} | run["metrics"]
    for name, role in (("ddim-5", evil + "baseline"), ("ours-5", evil + "plan")):
        change(
            tmp_path, name, name=role, metrics=metrics, command=evil, warnings=[evil],
            finished=evil, env={evil: {evil: evil}}, config={"pipe": evil, "plan": evil},
        )  # fmt: skip
    change(tmp_path, "ddim-50", config={"pipe": evil}, warnings=[evil, "#010101 var(--fg)"])
    html = write_report(tmp_path).read_text()
    assert "<script" not in html.lower()
    page = Page(html)
    assert "svg" in [tag for tag, _ in page.elements]
    assert evil in "".join(page.text)
    assert "#010101 var(--fg)" in "".join(page.text)


def test_pictures_are_the_pixels_of_the_shards(out, html):
    shown = {attrs["alt"]: attrs["src"] for attrs in Page(html).all("img")}
    for name, _, steps, damage in METHODS:
        noise = min(1.0, 0.1 * damage * (12 / steps) ** 0.5)
        for seed in range(8):
            png = base64.b64decode(shown[f"seed {seed}, {name}"].removeprefix("data:image/png;base64,"))
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), garment(seed, noise)[0])
        worst = json.loads((out / "runs" / f"{name}.json").read_text())["worst"]
        for item in worst:
            assert {f"seed {item['seed']}, {name}", f"seed {item['seed']}, ddim-50"} <= shown.keys()


def test_columns_are_in_order_of_cost(out, html):
    names = [run.name for run in load_bench(out).runs]
    latencies = [run.latency.median for run in load_bench(out).runs]
    assert latencies == sorted(latencies)
    alts = [attrs["alt"] for attrs in Page(html).all("img") if attrs["alt"].startswith("seed 0,")]
    assert alts[: len(names)] == [f"seed 0, {name}" for name in names]


def test_large_and_colour_images_are_shrunk_and_kept(tmp_path):
    small = picture(np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8), tmp_path)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(small.uri.split(",")[1]))))
    assert np.array_equal(pixels, np.arange(192, dtype=np.uint8).reshape(3, 8, 8).transpose(1, 2, 0))
    large = picture(np.zeros((3, 512, 256), dtype=np.uint8), tmp_path)
    assert (large.width, large.height, large.shrunk) == (LONGEST_SIDE // 2, LONGEST_SIDE, True)
    with pytest.raises(InputError, match=r"holds uint8 images of shape \(2, 4, 4\); a report shows"):
        picture(np.zeros((2, 4, 4), dtype=np.uint8), tmp_path)


def test_shards_that_do_not_fit_are_refused(tmp_path):
    shard = tmp_path / "shard-00000.safetensors"
    tensors = {"images": torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "seeds": torch.tensor([0, 1])}
    write_tensors(shard, tensors, {"config_hash": "aaaa"})
    assert set(find_pictures(tmp_path, [1, 5], "aaaa")) == {1}
    with pytest.raises(InputError, match="is of configuration 'aaaa', not 'bbbb'; delete it"):
        find_pictures(tmp_path, [1], "bbbb")
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"shard-00000.safetensors is corrupted .*; delete it and run"):
        find_pictures(tmp_path, [1], "aaaa")
    shard.write_bytes(struct.pack("<Q", 4) + b"null")
    with pytest.raises(InputError, match="corrupted"):
        find_pictures(tmp_path, [1], "aaaa")
    write_tensors(shard, {"seeds": torch.tensor([1])})
    with pytest.raises(InputError, match="corrupted"):
        find_pictures(tmp_path, [1], "aaaa")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"format": 2},
            r"is not a run \(format: Input should be 1, got 2\); delete it and run fewstep bench again",
        ),
        ({"nfe": "many"}, r"nfe: Input should be a valid number.*got 'many'"),
        ({"nfe": float("nan")}, "nfe: Input should be a finite number"),
        ({"role": "hero"}, "role: Input should be 'reference'"),
        (
            {"metrics": {"fd": {"value": 1.0, "se": 1.0, "n": 5}}},
            "metrics.fd.higher_is_better: Field required",
        ),
        ({"config_hash": "../../etc"}, "config_hash: String should match pattern"),
        (
            {"timing": {"latency_s": {"median": 0, "q1": 0, "q3": 0}}},
            "timing.latency_s.median: .*greater than 0",
        ),
    ],
)
def test_a_bad_run_is_named_with_its_mend(tmp_path, fields, message):
    fabricate(tmp_path, FEW, images=1)
    change(tmp_path, "ours-5", **fields)
    for write in (write_report, write_csv):
        with pytest.raises(InputError, match=message) as caught:
            write(tmp_path)
        assert str(tmp_path / "runs" / "ours-5.json") in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()
    assert not (tmp_path / "results.csv").exists()


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run; make some with: fewstep bench --out"):
        write_report(tmp_path)
    fabricate(tmp_path, FEW, images=1)
    (tmp_path / "runs" / "ours-5.json").write_text('{"format": 1,')
    with pytest.raises(InputError, match=r"ours-5.json is not valid JSON"):
        write_report(tmp_path)
    (tmp_path / "runs" / "ours-5.json").write_text("[]")
    with pytest.raises(InputError, match=r"ours-5.json is not a run \(the whole: "):
        write_report(tmp_path)
    write_json(tmp_path / "runs" / "ours-5.json", fabricate_run(*FEW[2]))
    change(tmp_path, "ours-5", name="ddim-5")
    with pytest.raises(InputError, match=r"ddim-5.json, ours-5.json hold the same name; delete or rename"):
        write_report(tmp_path)
    change(tmp_path, "ours-5", name="ours-5", config={"pipe": "demo:fashion-unet"})
    with pytest.raises(InputError, match=r"mixes pipelines: .*dit', 'ours-5' has 'demo:fashion-unet'; give"):
        write_report(tmp_path)
    other = fabricate_run(*FEW[2])
    other["metrics"]["fd_fashion"]["net_fingerprint"] = "0123"
    change(tmp_path, "ours-5", **other)
    with pytest.raises(InputError, match=r"mixes networks for fd_fashion: .*'ours-5' has '0123'; delete"):
        write_report(tmp_path)
    change(tmp_path, "ours-5", **fabricate_run(*FEW[2]) | {"role": "reference"})
    with pytest.raises(InputError, match=r"holds 2 references \('ddim-50', 'ours-5'\); keep one"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("kept", "fields", "expected"),
    [
        (FEW[:1], {}, "The reference ddim-50 scores fd_fashion"),
        (FEW[1:], {}, "There is no scored reference"),
        (FEW, {"timing": None}, "No timing was measured"),
        (FEW, {"metrics": {}, "paired": None, "floor": {}}, "hold no quality metric"),
        (FEW, {"worst": [], "env": {}, "command": "", "warnings": []}, "The runs do not state their command"),
    ],
    ids=["one row", "no reference", "no timing", "no metrics", "bare"],
)
def test_missing_parts_leave_a_whole_page(tmp_path, kept, fields, expected):
    fabricate(tmp_path, kept, images=8)
    for name, *_ in kept:
        change(tmp_path, name, **fields)
    html = write_report(tmp_path).read_text()
    text = words(html)
    assert expected in text
    assert not re.search(r"\b(nan|inf|None|undefined)\b", text)
    write_csv(tmp_path)


def test_without_shards_the_page_says_so(tmp_path):
    fabricate(tmp_path, FEW, images=0)
    assert "The shards of these runs are gone" in words(write_report(tmp_path).read_text())


def test_warnings_come_first_and_unequal_seeds_are_one(tmp_path):
    fabricate(tmp_path, FEW, images=1)
    change(tmp_path, "ours-5", n=64, seeds=[0, 64], warnings=["plan was tuned for other weights"])
    change(tmp_path, "ddim-5", paired={"against": "ddim-100", "metrics": {}})
    text = words(write_report(tmp_path).read_text())
    assert "plan was tuned for other weights" in text
    assert "not of the same images: n = 64 with seeds 0 to 63; n = 10,000 with seeds 0 to 9999" in text
    assert "Paired with another row than ddim-50" in text
    assert text.index("plan was tuned") < text.index("Quality against cost")


def test_verdict_names_the_winner_only_beyond_two_errors(tmp_path):
    methods = (("ddim-50", "reference", 50, 0.0), ("a-5", "baseline", 5, 1.0), ("b-5", "plan", 5, 1.0))
    fabricate(tmp_path, methods, images=0)

    def fd(name: str, value: float, se: float, gap: float) -> None:
        run = fabricate_run(*next(m for m in methods if m[0] == name))
        score = run["metrics"]["fd_fashion"] | {"value": value, "se": se}
        paired = {"against": "ddim-50", "metrics": {"fd_fashion": {"difference": gap, "se": se}}}
        change(tmp_path, name, metrics={"fd_fashion": score}, paired=paired)

    fd("a-5", 5.0, 0.3, 2.0)
    fd("b-5", 4.0, 0.4, 0.7)  # the gap of 1.0 is exactly two errors of 0.5
    text = verdict(load_bench(tmp_path)).striptags()
    assert "b-5 (4.00 ± 0.40) and a-5 (5.00 ± 0.30) lead and cannot be told apart" in text
    assert "cheapest method that is not measurably worse is b-5" in text
    assert "with a difference of +0.70 ± 0.40 (a difference below about 0.80 could not be seen)" in text
    assert "no plan is better beyond two standard errors (b-5)" in text
    fd("b-5", 3.9, 0.4, 0.9)
    text = verdict(load_bench(tmp_path)).striptags()
    assert "b-5 is best (3.90 ± 0.40), ahead of a-5 by 1.10 ± 0.50" in text
    assert "No cheaper method reaches it: the nearest, b-5, is" in text
    assert "worse by 0.90 ± 0.40" in text
    assert "every plan is better beyond two standard errors (b-5)" in text
    assert "biased upwards" not in text


def test_control_is_the_best_row_of_equal_latency(tmp_path):
    fabricate(tmp_path, images=0)
    bench = load_bench(tmp_path)
    for pair in controls(bench):
        rows = [r for r in bench.runs if r.role != "plan" and r.latency.median <= 1.05 * pair.plan.latency.median]
        best = min(r.metrics["fd_fashion"].value for r in rows)
        assert pair.control.metrics["fd_fashion"].value == best
    change(tmp_path, "timeshift-5", control="unipc-10")  # slower, but named by the bench
    found = {pair.plan.name: pair.control.name for pair in controls(load_bench(tmp_path))}
    assert found["timeshift-5"] == "unipc-10"
    assert found["searched-grid-5"] == "unipc-5"


@pytest.mark.parametrize("higher", [False, True])
def test_front_is_the_set_of_undominated_points(higher):
    rng = np.random.default_rng(3)
    for _ in range(200):
        pairs = rng.integers(1, 6, (rng.integers(1, 9), 2)).tolist()
        points = [Point(str(i), "plan", float(x), float(y)) for i, (x, y) in enumerate(pairs)]
        sign = -1 if higher else 1

        def dominated(p, points=points, sign=sign):
            return any(
                q.x <= p.x and sign * q.y <= sign * p.y and (q.x < p.x or sign * q.y < sign * p.y) for q in points
            )

        front = pareto_front(points, higher)
        assert {p.label for p in front} == {p.label for p in points if not dominated(p)}
        assert [p.x for p in front] == sorted(p.x for p in front)


def test_labels_do_not_overlap_in_a_crowd():
    rng = np.random.default_rng(0)
    area = Box(0, 0, 540, 380)
    for _ in range(20):
        anchors = [(float(x), float(y)) for x, y in rng.uniform((60, 60), (260, 320), (16, 2))]
        sizes = [(float(w), 12.0) for w in rng.uniform(40, 120, 16)]
        boxes = place_labels(anchors, sizes, area)
        assert [(box.width, box.height) for box in boxes] == sizes
        assert all(box.inside(area) for box in boxes)
        assert all(a.overlap(b) < 1e-6 for a, b in itertools.combinations(boxes, 2))
        markers = [Box(x - 4, y - 4, 8, 8) for x, y in anchors]
        assert all(box.overlap(marker) < 1e-6 for box in boxes for marker in markers)


@pytest.mark.parametrize("ys", [(5.0,), (5.0, 5.0), (-0.001, 0.02), (0.3, 40.0)])
@pytest.mark.parametrize("floor", [None, 0.16, 100.0])
def test_plots_of_odd_ranges_draw_every_point(ys, floor):
    points = tuple(Point(f"m{i}", "plan", 10.0, y, 9.0, 11.0, 0.1) for i, y in enumerate(ys))
    svg = pareto_svg(ParetoPlot(points, "ms", "fd", False, (5.0, None), floor), 400, 300, "title", "p")
    page = Page(svg)
    assert {f"m{i}" for i in range(len(ys))} <= set(page.text)
    assert ("floor (real images)" in svg) == (floor is not None)
    assert not re.search(r"#0[1-8]0[1-8]0[1-8]|DejaVu|nan", svg)


def test_numbers_are_rounded_to_their_errors():
    assert with_error(3.42134, 0.0812) == "3.421 ± 0.081"
    assert with_error(-1234.5, 61.0, signed=True) == "\N{MINUS SIGN}1,234 ± 61"
    assert with_error(0.5, None) == "0.5"
    assert with_error(12.0, 0.0, signed=True) == "+12 ± 0"
    assert [digits(x) for x in (0, 58.0, 104.4, 0.001234, 123456.0)] == [
        "0",
        "58.0",
        "104",
        "0.00123",
        "123,456",
    ]
    assert judge(Difference(difference=1.0, se=0.5), higher_is_better=True) == "level"
    assert judge(Difference(difference=1.01, se=0.5), higher_is_better=True) == "better"
    assert judge(Difference(difference=1.01, se=0.5), higher_is_better=False) == "worse"
    assert judge(Difference(difference=1.0), higher_is_better=True) == "unknown"
