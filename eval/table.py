"""The table of a bench for the terminal."""

from __future__ import annotations

from rich.table import Table

from .report_runs import Bench, Run

COSTS_WIDTH, COST_WIDTH, METRIC_WIDTH = 66, 11, 20
"Characters that the names and costs take, and each further cost and each metric beside them."


def bench_table(bench: Bench, width: int) -> Table:
    """One line per run in order of cost: the leading metrics with one standard error, and the costs.

    Args:
        bench: the runs.
        width: characters of a line; as many metrics are shown as fit, the rest is in the report.
    """
    reference = bench.reference
    against = f", differences to {reference.name} on the same seeds in the report" if reference else ""
    table = Table(title=f"{bench.runs[0].pipe}, n = {bench.runs[0].n:,}{against}", title_justify="left")
    table.add_column("name", no_wrap=True)
    costs = [cost for cost in bench.subject.costs if cost.wide]
    metrics = bench.metrics[: max(1, (width - COSTS_WIDTH - COST_WIDTH * len(costs)) // METRIC_WIDTH)]
    headings = [cost.heading for cost in costs]
    for heading in ("NFE", *headings, *metrics, "latency", f"{bench.subject.noun}s/s", "peak MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in bench.runs:
        scores = (_score(run, metric) for metric in metrics)
        style = {"reference": "bold", "control": "dim"}.get(run.role, "")
        shown = (cost.shown(run) or "-" for cost in costs)
        table.add_row(run.name, f"{run.nfe:g}", *shown, *scores, *_costs(run), style=style)
    return table


def _score(run: Run, metric: str) -> str:
    if metric not in run.metrics:
        return "-"
    score = run.metrics[metric]
    error = f" ± {score.se:.2g}" if score.se is not None else ""
    return f"{score.value:.4g}{error}"


def _costs(run: Run) -> tuple[str, str, str]:
    timing = run.timing
    if timing is None or timing.latency_s is None or timing.throughput is None or timing.peak_bytes is None:
        return ("-", "-", "-")
    latency_s = timing.latency_s.median
    latency = f"{latency_s:.3g} s" if latency_s >= 1 else f"{1000 * latency_s:.3g} ms"
    return (latency, f"{timing.throughput.images_per_s:.3g}", f"{timing.peak_bytes / 2**20:.0f}")
