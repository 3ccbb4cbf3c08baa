"""The pictures of a search's report, as inline SVG that takes its colours from the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ..eval.plots import ParetoPlot, Point, pareto_svg
from ..eval.svg import (
    BACKGROUND,
    BASELINE,
    FG,
    FONT_PX,
    GREY,
    LINE,
    MARKER_PX,
    MUTED,
    PLAN,
    Drawing,
    blank_figure,
    figure_svg,
    label_of,
    page_style,
    plain_axes,
    plain_log_ticks,
)
from ..samplers import InputError, Plan
from ..samplers.cache import CachePart
from ..samplers.guidance_schedule import GuidanceSchedule
from .found import Candidate, Found

COSTS = {
    "nfe": "network evaluations per image",
    "flops": "floating point operations per image",
    "latency_s": "latency of one image, s",
}

RUNG_MARKS = (("v", "▽"), ("<", "◁"), (">", "▷"), ("^", "△"))
"How pruned trials are drawn, by rung: the mark in the picture and the letter in its key."

WIDE, NARROW = 900, 358
ROW_PX = 25
LEAST_GAP_PX = 30
"Between two numbers at an axis."


def front_drawing(found: Found) -> Drawing | None:
    """Quality against cost of the front, the baselines and the teacher; None with one objective."""
    cost = found.cost
    if cost is None:
        return None
    roles = [(found.front, "plan"), (found.baselines, "baseline"), ((found.teacher,), "reference")]
    listed = [(candidate, role) for group, role in roles for candidate in group if candidate is not None]
    points = []
    for candidate, role in listed:
        scored = candidate.fresh or candidate.at_search
        if scored is not None and cost in scored.costs:
            quality = scored.quality
            label = f"{candidate.title} (found)" if candidate is found.best else candidate.title
            points.append(Point(label, role, scored.costs[cost], quality.value, se=quality.se))
    teacher = found.teacher.fresh if found.teacher else None
    plot = ParetoPlot(
        points=tuple(points),
        x_label=COSTS.get(cost, cost),
        y_label=_quality_label(found),
        higher_is_better=found.higher_is_better,
        band=(teacher.quality.value, teacher.quality.se) if teacher else None,
    )
    title = f"{found.metric} against {plot.x_label}; the numbers are in the table below"
    return Drawing(
        Markup(pareto_svg(plot, 680, 440, title, "wide-front")),
        Markup(pareto_svg(plot, NARROW, 340, title, "narrow-front")),
    )


def fresh_drawing(found: Found, rows: Sequence[Candidate]) -> Drawing:
    """What the search saw of each row beside what fresh seeds say."""

    def draw(axes: Axes, width: int) -> None:
        _name_rows(axes, found, rows, width)
        axes.set_xlabel(_quality_label(found), color=MUTED, fontsize=FONT_PX)
        for place, row in enumerate(rows):
            colour = _colour(found, row)
            pair = [(row.at_search, 0.16, BACKGROUND), (row.fresh, -0.16, colour)]
            for scored, offset, fill in pair:
                if scored is not None:
                    axes.errorbar(
                        [scored.quality.value], [place - offset], xerr=[2 * scored.quality.se], color=colour,
                        marker="o", markersize=MARKER_PX - 1.5, markerfacecolor=fill, markeredgecolor=colour,
                        elinewidth=1.1, linestyle="none", zorder=3,
                    )  # fmt: skip
        values = [s.quality.value for row in rows for s in (row.at_search, row.fresh) if s is not None]
        if min(values) > 0 and max(values) > 6 * min(values):
            axes.set_xscale("log")
            axes.set_xlim(min(values) / 1.2, max(values) * 1.2)
            plain_log_ticks(axes.xaxis, min(values) / 1.2, max(values) * 1.2)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6 if width == WIDE else 4))
        axes.grid(visible=True, axis="x", color=LINE, linewidth=0.6)

    title = f"{found.metric} at search and on fresh seeds; the numbers are in the tables"
    return _drawing(draw, 60 + (ROW_PX + 6) * len(rows), title, "fresh")


def history_drawing(found: Found) -> Drawing:
    """The quality of each trial in the order of the trials, and the best so far."""
    measured = [trial for trial in found.history if trial.at_search is not None]
    front = {candidate.order for candidate in found.front}

    def draw(axes: Axes, width: int) -> None:
        plain_axes(axes, "trial", _quality_label(found))
        groups = [
            ([t for t in measured if t.state == "complete" and t.holds], "o", GREY, GREY, 4.5),
            ([t for t in measured if t.state == "complete" and not t.holds], "o", BACKGROUND, GREY, 4.5),
            *(
                ([t for t in measured if t.state == "pruned" and rung_of(found, t) == rung], mark, BACKGROUND, GREY, 5)
                for rung, (mark, _) in enumerate(RUNG_MARKS)
            ),
            ([t for t in measured if t.order in front], "D", PLAN, BACKGROUND, 7),
        ]
        for trials, mark, fill, edge, size in groups:
            axes.plot(
                [t.order for t in trials], [_value(t) for t in trials], mark, markerfacecolor=fill,
                markeredgecolor=edge, markersize=size, markeredgewidth=0.9, linestyle="none",
            )  # fmt: skip
        steps = best_so_far(found)
        if steps:
            end = max(trial.order for trial in found.history)
            orders, values = [t.order for t in steps] + [end], [_value(t) for t in steps] + [_value(steps[-1])]
            axes.step(orders, values, where="post", color=PLAN, linewidth=1.4)
        values = [_value(trial) for trial in measured]
        if values and min(values) > 0 and max(values) > 6 * min(values):
            axes.set_yscale("log")
            axes.set_ylim(min(values) / 1.15, max(values) * 1.15)
            plain_log_ticks(axes.yaxis, min(values) / 1.15, max(values) * 1.15)
        failed = [trial.order for trial in found.history if trial.state == "failed"]
        axes.plot(failed, [0.02] * len(failed), "x", color=BASELINE, markersize=6, transform=axes.get_xaxis_transform())
        axes.xaxis.set_major_locator(MaxNLocator(8 if width == WIDE else 4, integer=True))
        axes.grid(visible=True, axis="y", color=LINE, linewidth=0.6)

    return _drawing(draw, 320, f"{found.metric} by trial", "history", left_px=52)


def grids_drawing(found: Found, rows: Sequence[Candidate]) -> Drawing | None:
    """At which log-SNR each row evaluates the network; None where no row says."""
    rows = [row for row in rows if row.log_snrs]
    if not rows:
        return None

    def draw(axes: Axes, width: int) -> None:
        _name_rows(axes, found, rows, width)
        axes.set_xlabel("log-SNR (noise to image)", color=MUTED, fontsize=FONT_PX)
        values = [value for row in rows for value in row.log_snrs]
        margin = 0.04 * (max(values) - min(values)) or 1.0
        axes.set_xlim(min(values) - margin, max(values) + margin)
        axes.xaxis.set_major_locator(MaxNLocator(9 if width == WIDE else 5))
        for place, row in enumerate(rows):
            size = MARKER_PX if len(row.log_snrs) <= 25 else 3.5
            colour = _colour(found, row)
            axes.plot(row.log_snrs, [place] * len(row.log_snrs), color=LINE, linewidth=1)
            whole = wholes(row.plan, len(row.log_snrs))
            for fill, kind in ((colour, True), (BACKGROUND, False)):
                values = [value for value, computed in zip(row.log_snrs, whole, strict=True) if computed == kind]
                axes.plot(
                    values, [place] * len(values), "o", markersize=size, markeredgecolor=colour, markerfacecolor=fill,
                    markeredgewidth=1.3 if size > 5 else 0.8, zorder=3,
                )  # fmt: skip
            _write_scales(axes, row, place)
        if found.best.log_snrs:
            _time_axis(axes, found.best)

    return _drawing(draw, 84 + (ROW_PX + 4) * len(rows), "evaluated noise levels by plan", "grids", top_px=44)


def wholes(plan: Plan, steps: int) -> tuple[bool, ...]:
    """Of each step, whether no cache of the plan leaves a part of the network out, as far as the plan says."""
    computed = [True] * steps
    for part in plan.caches:
        told = _computes(part, steps) if isinstance(part, CachePart) else None
        if told is not None and len(told) == steps:
            computed = [one and other for one, other in zip(computed, told, strict=True)]
    return tuple(computed)


def _computes(part: CachePart, steps: int) -> tuple[bool, ...] | None:
    try:
        return part.computes(steps)
    except InputError:  # made for the timesteps of a solver that evaluates some of them twice
        return None


def scales(plan: Plan, steps: int) -> tuple[float, ...]:
    """Of each step the guidance scale, where the plan changes it over the steps, else nothing."""
    part = plan.guidance
    if not isinstance(part, GuidanceSchedule) or (isinstance(part.scale, tuple) and len(part.scale) != steps):
        return ()
    found = tuple(part.scale_at(index, steps) for index in range(steps))
    return found if len(set(found)) > 1 else ()


def best_so_far(found: Found) -> list[Candidate]:
    """The complete trials within all limits that were better than any before them."""
    sign = -1 if found.higher_is_better else 1
    done = [t for t in found.history if t.state == "complete" and t.holds and t.at_search is not None]
    lowest = list(accumulate((sign * _value(trial) for trial in done), min))
    return [trial for place, trial in enumerate(done) if place == 0 or lowest[place] < lowest[place - 1]]


def rungs(found: Found) -> list[int]:
    """The numbers of images at which trials were pruned, growing."""
    return sorted({t.at_search.n for t in found.history if t.state == "pruned" and t.at_search is not None})


def rung_of(found: Found, trial: Candidate) -> int:
    """Which of `RUNG_MARKS` a pruned trial has."""
    assert trial.at_search is not None
    return min(rungs(found).index(trial.at_search.n), len(RUNG_MARKS) - 1)


def _value(trial: Candidate) -> float:
    assert trial.at_search is not None
    return trial.at_search.quality.value


def _quality_label(found: Found) -> str:
    return f"{found.metric} ({'higher' if found.higher_is_better else 'lower'} is better)"


def _colour(found: Found, row: Candidate) -> str:
    if row is found.teacher:
        return FG
    return BASELINE if any(row is other for other in found.baselines) else PLAN


def _name_rows(axes: Axes, found: Found, rows: Sequence[Candidate], width: int) -> None:
    """One line per row from the top, with its name at the left; that of the plan found stands out."""
    plain_axes(axes, "", "")
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    longest = 22 if width == WIDE else 14
    axes.set_yticks(range(len(rows)), [label_of(row.title, longest) for row in rows])
    axes.tick_params(axis="y", length=0, labelsize=FONT_PX - 1, labelcolor=FG)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row is found.best else "normal")


def _write_scales(axes: Axes, row: Candidate, place: int) -> None:
    """Guidance scales above the dots, as far as they have room."""
    last = float("-inf")
    for value, scale in zip(row.log_snrs, scales(row.plan, len(row.log_snrs)), strict=False):
        x = float(axes.transData.transform((value, place))[0])
        if x - last >= LEAST_GAP_PX:
            axes.annotate(
                f"{scale:.3g}", (value, place), xytext=(0, 8), textcoords="offset points", ha="center",
                color=MUTED, fontsize=FONT_PX - 3,
            )  # fmt: skip
            last = x


def _time_axis(axes: Axes, plan: Candidate) -> None:
    """The timesteps of one plan at the top, as far as they have room."""
    top = axes.secondary_xaxis("top")
    kept: list[tuple[float, float]] = []
    for value, time in sorted(zip(plan.log_snrs, plan.timesteps, strict=True)):
        x = float(axes.transData.transform((value, 0))[0])
        if not kept or x - float(axes.transData.transform((kept[-1][0], 0))[0]) >= LEAST_GAP_PX:
            kept.append((value, time))
    names = {value: f"{time:.4g}" for value, time in kept}
    top.xaxis.set_major_locator(FixedLocator(list(names)))
    top.xaxis.set_minor_locator(NullLocator())
    top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: names.get(value, "")))
    top.tick_params(colors=MUTED, length=3, labelsize=FONT_PX - 1)
    top.spines["top"].set_color(LINE)
    top.set_xlabel(f"timesteps of {label_of(plan.title)}", color=MUTED, fontsize=FONT_PX)


def _drawing(
    draw: Callable[[Axes, int], None],
    height_px: int,
    title: str,
    name: str,
    left_px: int | None = None,
    top_px: int = 12,
) -> Drawing:
    """Draws once for wide and once for narrow pages; without ``left_px`` there is room for names at the left."""
    made = []
    for shape, width in (("wide", WIDE), ("narrow", NARROW)):
        prefix = f"{shape}-{name}"
        with page_style(prefix):
            figure = blank_figure(width, height_px)
            left = left_px or (170 if width == WIDE else 110)
            axes = figure.add_axes(
                (left / width, 44 / height_px, 1 - (left + 14) / width, 1 - (44 + top_px) / height_px)
            )
            draw(axes, width)
            made.append(Markup(figure_svg(figure, title, prefix)))
    return Drawing(*made)
