"""What guidance in a window of the steps costs and saves against guidance in all of them, on ``demo:fashion-dit``.

``python -m fewstep.scripts.bench.guidance_window --work DIR --solvers solvers.json --n 2560 --out guidance.json``

With ``--repeats``, the latency of one call too, with one image and with `BATCH`: full guidance and a window are called
in turn, and the ratio of each pair is taken, so that what else the machine does cancels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from fewstep.eval.assets import load_pipeline
from fewstep.samplers import Plan, attach
from fewstep.samplers.files import write_json

from .judge import Judge, compared, fd
from .solvers import SCREEN_SEED
from .time_shift import base_plan

SOLVER = "dpmpp-2m"
STEPS = (10, 20)
WINDOWS = ((0.0, 0.6), (0.3, 1.0), (0.2, 0.8))
BATCH = 16


def windowed(plan: dict[str, Any], window: tuple[float, float]) -> dict[str, Any]:
    """The plan with guidance in a window only."""
    return plan | {"guidance": {"type": "guidance", "scale": plan["guidance"]["scale"], "window": window}}


def latency(pipe: Any, plan: dict[str, Any], images: int) -> float:
    """Seconds of one call."""
    with attach(pipe, Plan.from_json({"fewstep_plan": 1} | plan)):
        generators = [torch.Generator().manual_seed(seed) for seed in range(images)]
        began = time.perf_counter()
        pipe(class_labels=[seed % 10 for seed in range(images)], generator=generators, output_type="np")
        return time.perf_counter() - began


def latencies(pipe: Any, full: dict[str, Any], plan: dict[str, Any], images: int, repeats: int) -> dict[str, Any]:
    """Median latency of both and the quartiles of the ratio; a first pair is not counted."""
    pairs = [(latency(pipe, full, images), latency(pipe, plan, images)) for _ in range(repeats + 1)][1:]
    low, middle, high = statistics.quantiles([ours / theirs for theirs, ours in pairs], n=4)
    full_s, latency_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"full_s": full_s, "latency_s": latency_s, "ratio": middle, "ratio_quartiles": [low, high]}


def main() -> None:
    """Writes ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipe", default="demo:fashion-dit")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--solvers", type=Path, required=True, help="result of fewstep.scripts.bench.solvers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=2560)
    parser.add_argument("--screen_n", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=0, help="pairs of calls that are timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge(options.pipe, options.work, options.n, 0)
    screen = Judge(options.pipe, options.work, options.screen_n, SCREEN_SEED)
    pipe = load_pipeline(options.pipe)
    result: dict[str, Any] = {"solver": SOLVER, "steps": {}}
    result |= {key: getattr(options, key) for key in ("pipe", "n", "screen_n", "repeats")}
    for steps in STEPS:
        spacing, full = base_plan(SOLVER, steps, screen, options.solvers)
        plain = judge.row(full)
        rows = [compared(plain) | {"window": (0.0, 1.0)}]
        result["steps"][steps] = {"spacing": spacing, "rows": rows}
        for window in WINDOWS:
            plan = windowed(full, window)
            row = compared(judge.row(plan), plain) | {"window": window}
            if options.repeats > 1:
                row["latency"] = {size: latencies(pipe, full, plan, size, options.repeats) for size in (1, BATCH)}
            rows.append(row)
            print(steps, window, f"{fd(row):.2f}", row["difference"], row.get("latency"), flush=True)  # noqa: T201
            write_json(options.out, result)


if __name__ == "__main__":
    main()
