"""The students of a distillation beside their teacher: quality in each number of steps, and what the training took.

``python -m fewstep.scripts.bench.students --pipe demo:fashion-dit --students DIR DIR --work DIR --out students.json``

Each student is the folder of a ``fewstep distill``. Distances are to Fashion-MNIST's 10,000 test images, precision and
recall to training images, on seeds on which nobody was trained or chosen; differences are to the teacher's reference
plan on the same seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fewstep.eval.assets import DEMO, reference_plan
from fewstep.samplers import Plan
from fewstep.samplers.errors import InputError
from fewstep.samplers.files import read_json, write_json

from .excess import FRESH_SEED
from .judge import Judge, compared

TEACHER_STEPS = 50
FACTS = (
    "method",
    "student",
    "updates",
    "global_batch",
    "data",
    "seconds",
    "peak_bytes",
    "device",
    "trained_parameters",
    "command",
)
"Of a student's run.json, in the table."


def plans_of(folder: Path) -> dict[int, Path]:
    """The plan files of a student by number of steps, fewest first.

    Raises:
        InputError: when there are none.
    """
    found = {Plan.load(path).nominal_steps: path for path in sorted(folder.glob("plan*.json"))}
    if not found:
        raise InputError(f"{folder} holds no plan.json; give the folder that fewstep distill wrote")
    return {steps: found[steps] for steps in sorted(steps for steps in found if steps)}


def main() -> None:
    """Writes ``--out`` after each student; what was measured before stays in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipe", default="demo:fashion-dit")
    parser.add_argument("--students", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=FRESH_SEED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    test = DEMO / "fashion-features" / "test.safetensors"
    judge = Judge(options.pipe, options.work, options.n, options.seed, stats=test)
    others = Judge(options.pipe, options.work, options.n, options.seed)
    teacher = reference_plan(options.pipe, TEACHER_STEPS)
    base = judge.row(teacher)
    result: dict[str, Any] = dict(read_json(options.out)) if options.out.is_file() else {"students": {}}
    result |= {"pipe": options.pipe, "n": options.n, "seed": options.seed}
    result["teacher"] = _row(base, others.row(teacher), None)
    for folder in options.students:
        run = read_json(folder / "run.json")
        rows = {steps: _row(judge.row(path), others.row(path), base) for steps, path in plans_of(folder).items()}
        result["students"][folder.name] = {name: run[name] for name in FACTS} | {"rows": rows}
        write_json(options.out, result)


def _row(row: dict[str, Any], other: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    """A row with precision and recall to training images beside the distance to test images."""
    metrics = row["metrics"] | {name: other["metrics"][name] for name in ("precision", "recall")}
    return compared(row, base) | {"metrics": metrics}


if __name__ == "__main__":
    main()
