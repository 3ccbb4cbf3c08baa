"""OUT/results.csv, derived from OUT/runs and from nothing else."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from ..samplers.files import write_text
from .report_runs import Run, Timing, load_bench
from .subject import Subject


def write_csv(out: Path) -> Path:
    """Writes OUT/results.csv, one line per run of OUT/runs, and returns its path.

    Lines are ordered by network evaluations and name, never by a measured time, so that the same scores give
    the same lines. An empty cell means not measured. A text that a spreadsheet would run as a formula gets a
    leading apostrophe.

    Raises:
        InputError: when OUT/runs holds no run, or one that is damaged or does not belong.
    """
    bench = load_bench(out)
    stream = io.StringIO()
    columns = ["name", "pipe", "plan", "role", "nfe", "n"]
    columns += [column for metric in bench.metrics for column in (metric, f"{metric}_se")]
    columns += [
        "latency_s",
        "latency_q1_s",
        "latency_q3_s",
        bench.subject.rate,
        *(cost.column for cost in bench.subject.extra),
        "peak_bytes",
        "flops",
        "config_hash",
    ]
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    for run in sorted(bench.runs, key=lambda run: (run.nfe, run.name)):
        writer.writerow(_csv_line(run, bench.subject))
    path = out / "results.csv"
    write_text(path, stream.getvalue())
    return path


def _csv_line(run: Run, subject: Subject) -> dict[str, object]:
    timing = run.timing or Timing()
    latency = timing.latency_s
    line: dict[str, object] = {
        "name": _no_formula(run.name),
        "pipe": _no_formula(run.pipe),
        "plan": _no_formula(run.plan),
        "role": run.role,
        "nfe": run.nfe,
        "n": run.n,
        "latency_s": latency.median if latency else None,
        "latency_q1_s": latency.q1 if latency else None,
        "latency_q3_s": latency.q3 if latency else None,
        subject.rate: timing.throughput.images_per_s if timing.throughput else None,
        "peak_bytes": timing.peak_bytes,
        "flops": timing.flops,
        "config_hash": _no_formula(run.config_hash),
    }
    line |= {cost.column: _cell(cost.value(run)) for cost in subject.extra}
    for metric, score in run.metrics.items():
        line |= {metric: score.value, f"{metric}_se": score.se}
    return line


def _cell(value: Any) -> object:
    return str(value).lower() if isinstance(value, bool) else value


def _no_formula(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
