"""OUT/report.html, derived from OUT/runs and the samples in OUT and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..samplers.files import write_text
from .page import flat, flops, page_template
from .plots import ParetoPlot, Point, pareto_svg
from .report_answers import answer_samples
from .report_csv import write_csv
from .report_images import image_samples
from .report_runs import Bench, Latency, Run, Timing, load_bench, metric_family
from .subject import ANSWERS, IMAGES
from .svg import Drawing
from .verdict import (
    EQUAL_LATENCY,
    Control,
    Judgement,
    controls,
    controls_by_time,
    digits,
    judge,
    number,
    seconds,
    verdict,
    with_error,
)

__all__ = ["write_csv", "write_report"]

GRID_SEEDS = 8
SAMPLES = {IMAGES: image_samples, ANSWERS: answer_samples}
"What shows the samples of the first seeds, by what they are; its template is called report_images.html and so on."
SHARES = ("encode_s", "denoise_s", "decode_s", "other_s")

ABOUT = {
    "fd": "Fréchet distance between Gaussians fitted to features of generated and of real images; its bias "
    "falls with n, so only equal n compare.",
    "fid": "Fréchet distance on the standard Inception features of clean-fid; its bias falls with n.",
    "kd": "Kernel distance: squared maximum mean discrepancy, cubic kernel; unbiased, so it can be negative.",
    "kid": "Kernel distance on the standard Inception features, unbiased, so it can fall below 0.",
    "precision": "Share of generated images that lie inside the manifold of real ones: fidelity.",
    "recall": "Share of real images that lie inside the manifold of generated ones: variety.",
    "density": "How densely generated images sit among real ones: fidelity; resists outliers, may exceed 1.",
    "coverage": "Share of real images with a generated one nearby: variety; resists outliers.",
    "class": "Share of images that a classifier assigns to the class they were made for.",
    "clip": "Cosine between CLIP features of the image and of its prompt.",
    "vendi": "Effective number of distinct images in the sample, by the entropy of feature similarities.",
    "feature": "Distance in feature space to the reference's image of the same seed.",
    "lpips": "Learned perceptual distance to the reference's image of the same seed.",
    "ssim": "Structural similarity to the reference's image of the same seed; 1 is identical.",
    "psnr": "Peak signal-to-noise ratio to the reference's image of the same seed, in dB.",
    "worst": "Lowest of the tasks' shares of right answers. The smallest of several noisy shares is biased downwards: "
    "the fewer answers to a task, the lower it comes out; its error is that of the one task.",
    "mean": "Share of right answers, averaged over the tasks with equal weights.",
    "accuracy": "Share of right answers to one task. Errors are of (right + 2) / (n + 4), so that none is 0 where all "
    "answers are right or all wrong (Agresti and Coull 1998); those of paired differences count half an answer more in "
    "each of the four cells (Agresti and Min 2005).",
}


@dataclass(frozen=True)
class Score:
    """One cell of the quality table."""

    text: str
    difference: str
    judgement: Judgement


@dataclass(frozen=True)
class Row:
    """One method as the tables print it; a text that was not measured is empty."""

    number: int
    run: Run
    nfe: str
    scores: tuple[Score | None, ...]
    costs: tuple[str, ...]
    speeds: tuple[str, ...]
    latency: str
    quartiles: str
    first_call: str
    rate: str
    flops: str
    peak: str
    peak_kind: str
    weights: str
    shares: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class ControlRow:
    """One line of the fewer-steps control."""

    pair: Control
    plan_score: str
    plan_cost: str
    control_score: str
    control_cost: str
    difference: str


def write_report(out: Path) -> Path:
    """Writes OUT/report.html, one file without external resources or scripts, and returns its path.

    Raises:
        InputError: when OUT/runs holds no run, a run or shard is damaged, or the runs do not belong together.
    """
    bench = load_bench(out)
    seeds = range(bench.runs[0].seeds[0], bench.runs[0].seeds[0] + GRID_SEEDS)
    page = page_template("report.html").render(
        bench=bench,
        subject=bench.subject,
        verdict=verdict(bench),
        rows=[_row(bench, index, run) for index, run in enumerate(bench.runs, 1)],
        figures=_figures(bench),
        control_rows=_control_rows(bench),
        equal_percent=round(100 * (EQUAL_LATENCY - 1)),
        metrics=[_about_metric(bench, metric) for metric in bench.metrics],
        by_time=controls_by_time(bench),
        samples=SAMPLES[bench.subject](out, bench, seeds),
        digits=digits,
        environment=_environment(bench.runs),
        commands=sorted({run.command for run in bench.runs if run.command}),
        warnings=_warnings(bench),
        finished=_minute(max((run.finished for run in bench.runs if run.finished), default="")),
    )
    path = out / "report.html"
    write_text(path, page)
    return path


def _minute(timestamp: str) -> str:
    """An ISO 8601 time to the minute, anything else as it is."""
    try:
        return datetime.fromisoformat(timestamp).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return timestamp


def _row(bench: Bench, index: int, run: Run) -> Row:
    timing = run.timing or Timing()
    latency, throughput = timing.latency_s, timing.throughput
    quartiles = f"{seconds(latency.q1)} to {seconds(latency.q3)}" if latency else ""
    return Row(
        number=index,
        run=run,
        nfe=number(run.nfe),
        scores=tuple(_score(bench, run, metric) for metric in bench.metrics),
        costs=tuple(cost.shown(run) for cost in bench.subject.costs),
        speeds=tuple(cost.shown(run) for cost in bench.subject.speeds),
        latency=seconds(latency.median) if latency else "",
        quartiles=quartiles,
        first_call=_or_empty(timing.first_call_s, seconds),
        rate=f"{digits(throughput.images_per_s)} at batch {throughput.batch}" if throughput else "",
        flops=_or_empty(timing.flops, flops),
        peak=_or_empty(timing.peak_bytes, _bytes),
        peak_kind=(timing.peak_kind or "").replace("_", " ") if timing.peak_bytes is not None else "",
        weights=_or_empty(timing.weights_bytes, _bytes),
        shares=_shares(timing),
    )


def _score(bench: Bench, run: Run, metric: str) -> Score | None:
    if metric not in run.metrics:
        return None
    score = run.metrics[metric]
    gap = bench.difference(run, metric)
    difference = with_error(gap.difference, gap.se, signed=True) if gap else ""
    return Score(with_error(score.value, score.se), difference, judge(gap, score.higher_is_better))


def _or_empty(value: Any, render: Any) -> str:
    return "" if value is None else render(value)


def _bytes(value: float) -> str:
    return f"{digits(value / 2**30)} GiB" if value >= 2**30 else f"{digits(value / 2**20)} MiB"


def _shares(timing: Timing) -> tuple[tuple[str, float], ...]:
    """Percent of one call by component, empty without a measurement."""
    parts = [(part, float(getattr(timing.shares_s, part, 0.0))) for part in SHARES]
    total = sum(value for _, value in parts)
    return tuple((part.removesuffix("_s"), 100 * value / total) for part, value in parts) if total else ()


def _figures(bench: Bench) -> list[Drawing]:
    """Quality against latency where it was measured, and against a count that no clock can move."""
    metric = bench.primary
    if metric is None:
        return []
    rows = [(index, run) for index, run in enumerate(bench.runs, 1) if metric in run.metrics]
    timed = [(index, run, run.latency) for index, run in rows if run.latency]
    figures = []
    if timed:
        factor, unit = (1000.0, "ms") if max(latency.median for _, _, latency in timed) < 1 else (1.0, "s")
        spread = {run.name: _scaled(latency, factor) for _, run, latency in timed}
        axis = Axis(f"latency of one {bench.subject.noun}, {unit}", "latency", spread)
        figures.append(_figure(bench, metric, [(index, run) for index, run, _ in timed], axis))
    count = bench.subject.count
    axis = Axis(count.label, count.prefix, {run.name: (count.value(run), None, None) for _, run in rows})
    return [*figures, _figure(bench, metric, rows, axis)]


Spread = tuple[float, float | None, float | None]


@dataclass(frozen=True)
class Axis:
    """A cost to draw the quality against; ``prefix`` goes before the ids of its figure."""

    label: str
    prefix: str
    costs: Mapping[str, Spread]


def _scaled(latency: Latency, factor: float) -> Spread:
    return (latency.median * factor, latency.q1 * factor, latency.q3 * factor)


def _figure(bench: Bench, metric: str, rows: Sequence[tuple[int, Run]], axis: Axis) -> Drawing:
    """Labels are names where there is room, and the numbers of the tables on a narrow page."""
    higher = rows[0][1].metrics[metric].higher_is_better
    band = bench.reference.metrics.get(metric) if bench.reference else None
    floor = bench.floor(metric)
    title = f"{metric} against {axis.label}; the numbers are in the tables below"

    def draw(named: bool, width: int, height: int) -> Markup:
        points = tuple(
            Point(
                run.name if named else str(index), run.role, axis.costs[run.name][0], run.metrics[metric].value,
                axis.costs[run.name][1], axis.costs[run.name][2], run.metrics[metric].se,
            )
            for index, run in rows
        )  # fmt: skip
        plot = ParetoPlot(
            points=points,
            x_label=axis.label,
            y_label=f"{metric} ({'higher' if higher else 'lower'} is better)",
            higher_is_better=higher,
            band=(band.value, band.se) if band else None,
            floor=floor.value if floor else None,
            even=bench.subject.shares,
        )
        prefix = f"{'wide' if named else 'narrow'}-{axis.prefix}"
        return Markup(pareto_svg(plot, width, height, title, prefix))

    return Drawing(draw(True, 600, 440), draw(False, 358, 340))


def _control_rows(bench: Bench) -> list[ControlRow]:
    metric = bench.primary
    if metric is None:
        return []

    def spent(run: Run) -> str:
        return seconds(run.latency.median) if run.latency and controls_by_time(bench) else f"{number(run.nfe)} NFE"

    rows = []
    for pair in controls(bench):
        score = pair.plan.metrics[metric]
        other = pair.control.metrics[metric] if pair.control else None
        rows.append(
            ControlRow(
                pair=pair,
                plan_score=with_error(score.value, score.se),
                plan_cost=spent(pair.plan),
                control_score=with_error(other.value, other.se) if other else "",
                control_cost=spent(pair.control) if pair.control else "",
                difference=with_error(pair.gap.difference, pair.gap.se, signed=True) if pair.gap else "",
            )
        )
    return rows


def _about_metric(bench: Bench, metric: str) -> dict[str, str]:
    """Name, meaning, direction, n and network of one metric, in words."""
    scores = [run.metrics[metric] for run in bench.runs if metric in run.metrics]
    counts = sorted({score.n for score in scores})
    floor = bench.floor(metric)
    return {
        "name": metric,
        "about": ABOUT.get(metric_family(metric), "A metric that this version has no description of."),
        "better": "higher" if scores[0].higher_is_better else "lower",
        "n": " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1]))),
        "net": scores[0].net_fingerprint or "",
        "against": ", ".join(sorted({score.reference for score in scores if score.reference})),
        "floor": number(floor.value) + (f" (n = {floor.n:,})" if floor.n else "") if floor else "",
    }


def _environment(runs: Sequence[Run]) -> list[tuple[str, dict[str, list[str]]]]:
    """Every key of the environments with its values, each with the runs that have it."""
    table: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for key, value in flat(run.env):
            table.setdefault(key, {}).setdefault(value, []).append(run.name)
    return sorted(table.items())


def _warnings(bench: Bench) -> list[tuple[str, list[str]]]:
    """Warnings of the runs and of their comparison, each with the rows it is about."""
    found: dict[str, list[str]] = {}
    for run in bench.runs:
        for text in run.warnings:
            found.setdefault(text, []).append(run.name)
    sets = {(run.n, run.seeds) for run in bench.runs}
    if len(sets) > 1:
        listed = "; ".join(f"n = {n:,} with seeds {first} to {end - 1}" for n, (first, end) in sorted(sets))
        found[f"The rows are not of the same {bench.subject.noun}s: {listed}. Distances depend on n."] = []
    if not bench.timed and any(run.latency for run in bench.runs):
        untimed = [run.name for run in bench.runs if not run.latency]
        found["Not timed, so the tables are in order of network evaluations."] = untimed
    reference = bench.reference
    if reference is None:
        found["No run is the reference, so there are no paired differences and no worst pairs."] = []
    else:
        strangers = [run.name for run in bench.runs if run.paired and run.paired.against != reference.name]
        if strangers:
            found[f"Paired with another row than {reference.name}; their differences are left out."] = strangers
    return list(found.items())
