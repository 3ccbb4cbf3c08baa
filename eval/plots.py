"""Pareto plots of quality against cost, with labels that keep out of each other's way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .svg import (
    BACKGROUND,
    BAND,
    BASELINE,
    FG,
    FONT_PX,
    GREY,
    LINE,
    MARKER_PX,
    MUTED,
    PLAN,
    blank_figure,
    figure_svg,
    label_of,
    page_style,
    plain_axes,
    plain_log_ticks,
)

MARKERS = {"reference": "s", "baseline": "o", "control": "^", "plan": "D"}
COLOURS = {"reference": FG, "baseline": BASELINE, "control": BASELINE, "plan": PLAN}


@dataclass(frozen=True)
class Point:
    """One method: cost ``x`` (positive) with quartiles, quality ``y`` with its standard error."""

    label: str
    role: str
    x: float
    y: float
    x_low: float | None = None
    x_high: float | None = None
    se: float | None = None


@dataclass(frozen=True)
class ParetoPlot:
    """What one plot shows.

    Attributes:
        points: the methods.
        x_label: cost and its unit.
        y_label: metric and which direction is better.
        higher_is_better: direction of ``y``.
        band: the reference's value and standard error, None without one.
        floor: what real data scores, None when unknown.
        even: whether ``y`` is between 0 and 1, and never drawn on a logarithmic scale.
    """

    points: tuple[Point, ...]
    x_label: str
    y_label: str
    higher_is_better: bool
    band: tuple[float, float | None] | None = None
    floor: float | None = None
    even: bool = False


@dataclass(frozen=True)
class Box:
    """An axis-parallel rectangle in pixels, lower left corner and size."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """Area that both cover, in square pixels."""
        wide = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        high = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(0.0, wide) * max(0.0, high)

    def inside(self, area: Box) -> bool:
        """Whether all of it lies in ``area``."""
        return math.isclose(self.overlap(area), self.width * self.height, rel_tol=1e-9)


def pareto_front(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """The points that no other point beats in cost without losing quality, in order of cost.

    A point is dominated when another is at least as cheap and at least as good, and one of both strictly.
    """
    sign = -1.0 if higher_is_better else 1.0
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, sign * p.y)):
        best = sign * front[-1].y if front else math.inf
        ties = bool(front) and point.x == front[-1].x and sign * point.y == best
        if sign * point.y < best or ties:
            front.append(point)
    return front


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    area: Box,
    obstacles: Sequence[Box] = (),
) -> list[Box]:
    """A place for every label, near its anchor, inside ``area``, off all markers and off each other.

    Args:
        anchors: centres of the markers, in pixels.
        sizes: width and height of each label, in pixels.
        area: where labels may lie.
        obstacles: what else the labels should stay off.

    Returns:
        One box per label. Where a crowd leaves no free place, the one of least overlap.
    """
    taken = [Box(x - MARKER_PX / 2, y - MARKER_PX / 2, MARKER_PX, MARKER_PX) for x, y in anchors]
    taken += obstacles
    boxes: list[Box] = []
    for anchor, size in zip(anchors, sizes, strict=True):
        options = [box for box in _around(anchor, size) if box.inside(area)] or _around(anchor, size)
        # min keeps the first of equals, and the options come nearest first.
        best = min(options, key=lambda box: round(sum(box.overlap(other) for other in taken), 6))
        boxes.append(best)
        taken.append(best)
    return boxes


def _around(anchor: tuple[float, float], size: tuple[float, float]) -> list[Box]:
    """Candidate boxes beside an anchor, rings of growing distance, to the right first."""
    (x, y), (width, height) = anchor, size
    boxes = []
    for ring in range(16):
        gap = MARKER_PX / 2 + 3 + 9 * ring
        for turn in range(16):
            angle = (-1) ** turn * math.ceil(turn / 2) * math.pi / 8
            centre_x = x + math.cos(angle) * (gap + width / 2)
            centre_y = y + math.sin(angle) * (gap + height / 2)
            boxes.append(Box(centre_x - width / 2, centre_y - height / 2, width, height))
    return boxes


def pareto_svg(plot: ParetoPlot, width_px: int, height_px: int, title: str, prefix: str) -> str:
    """The plot as an SVG element whose labels are text and whose colours are CSS variables.

    Args:
        plot: what to draw; at least one point.
        width_px: width of the view box.
        height_px: height of the view box.
        title: what a screen reader says.
        prefix: goes before every id, so that several plots share a page.
    """
    with page_style(prefix):
        figure = blank_figure(width_px, height_px)
        axes = figure.add_axes((52 / width_px, 46 / height_px, 1 - 64 / width_px, 1 - 58 / height_px))
        _draw_axes(axes, plot)
        _draw_points(axes, plot)
        _draw_labels(figure, axes, plot, _draw_levels(axes, plot))
        return figure_svg(figure, title, prefix)


def _draw_axes(axes: Axes, plot: ParetoPlot) -> None:
    plain_axes(axes, plot.x_label, plot.y_label)
    xs = [x for p in plot.points for x in (p.x, p.x_low or p.x, p.x_high or p.x)]
    axes.set_xscale("log")
    axes.set_xlim(min(xs) / 1.25, max(xs) * 1.6)
    plain_log_ticks(axes.xaxis, min(xs) / 1.25, max(xs) * 1.6)
    _set_y(axes, plot)
    axes.grid(visible=True, axis="y", color=LINE, linewidth=0.6)


def _set_y(axes: Axes, plot: ParetoPlot) -> None:
    """Logarithmic when positive values spread over more than a factor of six, else linear; linear where asked for."""
    values = [p.y for p in plot.points] + ([plot.floor] if plot.floor is not None and not _far(plot) else [])
    if not plot.even and min(values) > 0 and max(values) / min(values) > 6:
        axes.set_yscale("log")
        room = max(1.25, (max(values) / min(values)) ** 0.12)
        low, high = min(values) / room, max(values) * room
        plain_log_ticks(axes.yaxis, low, high)
    else:
        ends = [p.y + k * 2 * (p.se or 0) for p in plot.points for k in (-1, 1)] + values
        ends = [min(1.0, max(0.0, end)) for end in ends] if plot.even else ends
        margin = 0.1 * (max(ends) - min(ends)) or 0.1 * abs(max(ends)) or 1.0
        low, high = min(ends) - 1.3 * margin, max(ends) + margin
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_ylim(low, high)


def _far(plot: ParetoPlot) -> bool:
    """Whether the floor would take more than half of the axis for itself: then it stands at the edge."""
    if plot.floor is None:
        return False
    values = [p.y for p in plot.points]
    gap = max(min(values) - plot.floor, plot.floor - max(values))
    if min(*values, plot.floor) > 0 and gap > 0:
        factor = max(min(values) / plot.floor, plot.floor / max(values))
        return factor > max(1.5, max(values) / min(values))
    return gap > max(values) - min(values) > 0


def _draw_levels(axes: Axes, plot: ParetoPlot) -> list[Box]:
    """The reference's band and the floor; returns where text was written."""
    if plot.band is not None:
        value, se = plot.band
        low, high = axes.get_ylim()
        if se:
            axes.axhspan(max(low, value - 2 * se), min(high, value + 2 * se), color=BAND, linewidth=0)
        axes.axhline(value, color=MUTED, linewidth=0.8)
    if plot.floor is None:
        return []
    low, high = axes.get_ylim()
    height = min(max(plot.floor, low), high)
    axes.axhline(height, color=MUTED, linewidth=1.6, linestyle=(0, (1, 2)), clip_on=False)
    text = axes.annotate(
        f"{'off the scale: ' if _far(plot) else ''}floor (real images) {plot.floor:.3g}",
        (1, height), xycoords=("axes fraction", "data"), xytext=(0, -5 if height == high else 5),
        textcoords="offset points", ha="right", va="top" if height == high else "bottom",
        color=MUTED, fontsize=FONT_PX - 1,
    )  # fmt: skip
    extent = text.get_window_extent()
    return [Box(extent.x0, extent.y0, extent.width, extent.height)]


def _draw_points(axes: Axes, plot: ParetoPlot) -> None:
    front = pareto_front(plot.points, plot.higher_is_better)
    axes.step([p.x for p in front], [p.y for p in front], where="post", color=PLAN, linewidth=1.2, alpha=0.7)
    for point in plot.points:
        colour = COLOURS[point.role] if point in front or point.role == "reference" else GREY
        spread = [[point.x - point.x_low], [point.x_high - point.x]] if point.x_low and point.x_high else None
        axes.errorbar(
            [point.x], [point.y], yerr=2 * point.se if point.se else None, xerr=spread,
            color=colour, marker=MARKERS[point.role], markersize=MARKER_PX, elinewidth=1.1,
            markeredgecolor=BACKGROUND, markeredgewidth=0.7, linestyle="none", zorder=3,
        )  # fmt: skip


def _draw_labels(figure: Figure, axes: Axes, plot: ParetoPlot, written: Sequence[Box]) -> None:
    fitted = [label_of(point.label) for point in plot.points]
    texts = [axes.text(0, 0, text, fontsize=FONT_PX - 1, color=FG) for text in fitted]
    sizes = [(box.width, box.height) for box in (text.get_window_extent() for text in texts)]
    anchors = [tuple(axes.transData.transform((point.x, point.y))) for point in plot.points]
    frame = axes.get_window_extent()
    area = Box(frame.x0 + 2, frame.y0 + 2, frame.width + 8, frame.height + 8)
    obstacles = [*written, *(_bar(axes, point) for point in plot.points)]
    for text, anchor, box in zip(texts, anchors, place_labels(anchors, sizes, area, obstacles), strict=True):
        text.remove()
        x, y = box.x + box.width / 2, box.y + box.height / 2
        near_x = min(max(anchor[0], box.x), box.x + box.width)
        near_y = min(max(anchor[1], box.y), box.y + box.height)
        if math.hypot(near_x - anchor[0], near_y - anchor[1]) > MARKER_PX + 4:
            figure.add_artist(
                mpl.lines.Line2D([anchor[0], near_x], [anchor[1], near_y], color=GREY, linewidth=0.6, transform=None)
            )
        figure.text(x, y, text.get_text(), fontsize=FONT_PX - 1, color=FG, ha="center", va="center", transform=None)


def _bar(axes: Axes, point: Point) -> Box:
    """The vertical error bar of ``point`` in pixels."""
    reach = 2 * (point.se or 0.0)
    low = max(point.y - reach, axes.get_ylim()[0])
    (x, bottom), (_, top) = (axes.transData.transform((point.x, y)) for y in (low, point.y + reach))
    return Box(x - 1, bottom, 2, top - bottom)
