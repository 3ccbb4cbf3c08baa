"""docs/samplers.md says what docs/results holds, and nothing else."""

import json
import re
from pathlib import Path

import pytest

from fewstep.samplers import Plan
from fewstep.scripts import samplers_doc

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / samplers_doc.RESULTS
FILES = [
    path for name in ("solvers", "parts", "time-shift", "guidance") for path in sorted(RESULTS.glob(f"{name}-*.json"))
]
DOCUMENT = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")


def row(fd, se=0.5, **rest):
    return {"plan": {}, "nfe": 5.0, "metrics": {"fd": {"value": fd, "se": se}}} | rest


def write(folder, name, value):
    (folder / f"{name}.json").write_text(json.dumps(value))


def lines(text, start):
    return [line for line in text.split("\n") if line.startswith(start)]


def rows_within(value):
    """Every measured row in a file of results."""
    if isinstance(value, dict) and "plan" in value:
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from rows_within(item)


def test_the_document_is_the_generated_one():
    assert samplers_doc.document(RESULTS) == DOCUMENT, "run python -m fewstep.scripts.tables"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_results_hold_plans_that_run_and_fit_in_a_repository(path):
    assert path.stat().st_size < 200_000
    rows = list(rows_within(json.loads(path.read_text(encoding="utf-8"))))
    assert rows
    for found in rows:
        Plan.from_json({"fewstep_plan": 1} | found["plan"])
        assert found["nfe"] > 0
        assert "fd_jackknife" not in found


def test_what_was_not_measured_is_said(tmp_path):
    text = samplers_doc.document(tmp_path)
    assert text.count("Not measured.") == 7
    assert "python -m" not in text.split("## Commands")[1]


def test_schedulers_with_their_spacing_and_the_least_of_each_budget_in_bold(tmp_path):
    budgets = {str(budget): row(9.0, spacing="leading") for budget in samplers_doc.BUDGETS}
    one = {"screened": {}, "rows": budgets | {"5": row(7.25, 0.26, spacing="karras")}}
    other = {
        "screened": {},
        "rows": budgets | {"4": None, "5": row(8.0, spacing="None"), "6": row(3.0, spacing="beta")},
    }
    write(tmp_path, "solvers-dit", {"n": 2560, "screen_n": 256, "solvers": {"one": one, "other": other}})
    text = samplers_doc.document(tmp_path)
    assert "**`fashion-dit`**, 2,560 images a row" in text
    cells = lines(text, "| `one`")[0].split(" | ")
    assert cells[1:4] == ["**9.0 ± 0.5** (leading)", "**7.2 ± 0.3** (karras)", "9.0 ± 0.5 (leading)"]
    assert lines(text, "| `other`")[0].split(" | ")[1:4] == ["refused", "8.0 ± 0.5", "**3.0 ± 0.5** (beta)"]
    assert "Not measured: `ddim`, " in text
    command = "scripts.bench.solvers --pipe demo:fashion-dit --work work/dit --n 2560 --screen_n 256 --out docs/results"
    assert command in text


def test_differences_beyond_two_errors_are_bold_and_counted(tmp_path):
    rows = {
        "plain": row(9.0),
        "early-start": row(8.0, difference=[-1.0, 0.49]),
        "analytic-init": row(8.1, difference=[-0.9, 0.46], beside=[0.1, 0.04]),
    }
    cases = [{"solver": "ddim", "budget": 5, "spacing": "leading", "rows": rows}]
    cases.append(
        {"solver": "ddim", "budget": 10, "spacing": "leading", "rows": {"early-start": row(9, difference=[3, 1])}}
    )
    write(tmp_path, "parts-unet", {"n": 640, "cases": cases})
    text = samplers_doc.document(tmp_path)
    start = "| `ddim` 5 (leading) | "
    assert lines(text, start + "`early-start`") == [
        start + "`early-start` | 5 | 8.00 ± 0.50 | **-1.00 ± 0.49** |  |  |  |"
    ]
    assert "| -0.90 ± 0.46 | **+0.10 ± 0.04** |" in lines(text, start + "`analytic-init`")[0]
    assert "| `early-start` | – | 1 better, 1 worse, of 2 |" in text
    assert "| `analytic-init` | – | 0 better, 0 worse, of 1 |" in text


def test_overheads_are_in_percent_of_the_network(tmp_path):
    share = {"share_of_network": -0.00041, "q1": -0.002, "q3": 0.0125}
    found = {"demo:fashion-dit": {"guidance": share, "aligner": share}, "demo:fashion-unet": {"aligner": share}}
    write(tmp_path, "overhead", {"steps": 10, "batch_size": 64, "repeats": 9, "overhead": found})
    text = samplers_doc.document(tmp_path)
    assert "10 steps, batch 64, 9 pairs of calls." in text
    assert lines(text, "| `guidance` |") == ["| `guidance` | -0.04 % (-0.20 to 1.25) |  |"]
    assert lines(text, "| `aligner` |")[0].count("-0.04 %") == 2
    assert "scripts.bench.overhead --repeats 9 --out docs/results/overhead.json" in text


def test_commands_have_the_flags_of_their_scripts():
    commands = re.findall(r"python -m fewstep\.scripts\.bench\.(\w+) (.*)", DOCUMENT)
    assert {name for name, _ in commands} >= {"solvers"}
    for name, flags in commands:
        source = (ROOT / "scripts" / "bench" / f"{name}.py").read_text(encoding="utf-8")
        for flag in re.findall(r"--\w+", flags):
            assert f'add_argument("{flag}"' in source
