"""docs/caches.md says what docs/results holds, and nothing else."""

import json
import re
from pathlib import Path

from fewstep.scripts import caches_doc

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "caches.md").read_text(encoding="utf-8")
MACHINE = {"cpu": "a processor", "cores": 2, "threads": 1, "packages": {"torch": "2.6"}}


def row(whose, method, distance, flops, **rest):
    metrics = {"fd": {"value": 9.0, "se": 0.5}}
    metrics |= {"psnr": {"value": 30.0, "se": 0.1}, "feature_distance": {"value": distance, "se": 0.01}}
    row = {"whose": whose, "method": method, "setting": "2", "metrics": metrics, "flops": flops, "bytes": 2048.0}
    return row | {"times": {}} | rest


def write(folder, name, **value):
    (folder / f"caches-{name}.json").write_text(json.dumps({"repeats": 7, "machine": MACHINE} | value))


def test_the_document_is_the_generated_one():
    assert caches_doc.document(ROOT / caches_doc.RESULTS) == DOCUMENT, "run python -m fewstep.scripts.tables"


def test_what_was_not_measured_is_said(tmp_path):
    text = caches_doc.document(tmp_path)
    assert text.count("Not measured.") == 3
    assert "python -m" not in text.split("## Commands")[1]


def test_rows_verdicts_and_commands(tmp_path):
    speed = {clock: {"ratio": 1.9, "quartiles": [1.8, 2.0]} for clock in ("wall", "processor")}
    rows = [
        row("control", "uncached", 0.0, 1.0),
        row("peer", "x", 1.0, 1.5, difference=[0.9, 0.5], times={"1": speed}),
        row("ours", "gate", 1.0, 2.0, difference=[-1.1, 0.5], times={"1": speed}),
    ]
    write(tmp_path, "dit", n=256, seed=0, rows=rows)
    text = caches_doc.document(tmp_path)
    assert "256 images a row, seeds from 0 on. Measured on a processor, 2 cores, 1 thread, with torch 2.6." in text
    said = "1.90 (1.80 to 2.00)"
    assert f"| x: 2 | 30.0 ± 0.1 | 1.000 ± 0.010 | 9.00 ± 0.50 | +0.90 ± 0.50 | 1.50 | {said} | {said} | 2 |" in text
    assert f"| **-1.10 ± 0.50** | 2.00 | {said} | {said} | 2 |" in text
    assert "| 1.000 | 1.50 (x: 2) | 2.00 (gate) | 1.00 | 1.33 |" in text
    assert "met at 1 of 1 distances; the median is 1.33, the range 1.33 to 1.33." in text
    assert "met at 0 of 1 distances; the median is 1.00, the range 1.00 to 1.00." in text
    command = "bench.caches --pipe demo:fashion-dit --work work/dit --n 256 --repeats 7 --batches 1 --out docs/results"
    assert command in text


def test_shares_of_wide_networks(tmp_path):
    clocks = {clock: {"ratio": 1.8, "quartiles": [1.7, 1.9]} for clock in ("wall", "processor")}
    rows = [
        {"cache": "blocks", "flops": 2.0, "bytes": 2**21, "times": clocks, "share": {"wall": 0.9, "processor": 0.96}}
    ]
    networks = {"dit-xl": {"about": "DiT-XL/2", "parameters": 675_000_000, "rows": rows}}
    write(tmp_path, "wide", steps=2, networks=networks)
    text = caches_doc.document(tmp_path)
    assert "DiT-XL/2 (0.68 billion parameters):" in text
    assert "| blocks | 2.000 | 1.80 (1.70 to 1.90) | 1.80 (1.70 to 1.90) | 0.900 | 0.960 | 2.0 |" in text
    assert "By the wall clock the goal, a share of 0.95, is met by 0 of 1; the least is 0.900." in text
    assert "By the processor clock the goal, a share of 0.95, is met by 1 of 1; the least is 0.960." in text


def test_commands_have_the_flags_of_their_scripts():
    commands = re.findall(r"python -m fewstep\.scripts\.bench\.(\w+) (.*)", DOCUMENT)
    assert {name for name, _ in commands} <= {"caches", "wide"}
    for name, flags in commands:
        source = (ROOT / "scripts" / "bench" / f"{name}.py").read_text(encoding="utf-8")
        for flag in re.findall(r"--\w+", flags):
            assert f'add_argument("{flag}"' in source
