"""Figures as inline SVG that takes its colours and fonts from the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Placeholders that become the page's CSS variables after rendering.
INK = {
    "#010101": "var(--fg)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--plan)",
    "#050505": "var(--baseline)",
    "#060606": "var(--band)",
    "#070707": "var(--grey)",
    "#080808": "var(--bg)",
}
FG, MUTED, LINE, PLAN, BASELINE, BAND, GREY, BACKGROUND = INK

FONT_PX = 12
MARKER_PX = 8.0


@dataclass(frozen=True)
class Drawing:
    """One picture in two shapes, for wide and for narrow pages."""

    wide: Markup
    narrow: Markup


@contextmanager
def page_style(salt: str) -> Iterator[None]:
    """Settings under which figures are made and written; ``salt`` makes their ids reproducible."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "DejaVu Sans",
        "font.size": FONT_PX,
        "text.parse_math": False,
        "axes.unicode_minus": True,
    }
    with mpl.rc_context(style):
        yield


def blank_figure(width_px: int, height_px: int) -> Figure:
    """A figure of so many pixels without a background."""
    figure = Figure(figsize=(width_px / 72, height_px / 72), dpi=72)
    figure.patch.set_visible(False)
    return figure


def figure_svg(figure: Figure, title: str, prefix: str) -> str:
    """The figure as an SVG element whose labels are text and whose colours are CSS variables.

    Args:
        figure: drawn with the colours of `INK`, under `page_style`.
        title: what a screen reader says.
        prefix: goes before every id, so that several figures share a page.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_the_page(stream.getvalue(), title, prefix)


def plain_axes(axes: Axes, x_label: str, y_label: str) -> None:
    """Leaves two thin spines, small ticks and muted labels."""
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
    axes.tick_params(colors=MUTED, which="both", length=3, labelsize=FONT_PX - 1)
    axes.set_xlabel(x_label, color=MUTED, fontsize=FONT_PX)
    axes.set_ylabel(y_label, color=MUTED, fontsize=FONT_PX)
    axes.set_axisbelow(True)


def plain_log_ticks(axis: mpl.axis.Axis, low: float, high: float) -> None:
    """Plain numbers at 1, 2, 5 of each decade, or at round steps where that leaves fewer than three."""
    candidates = LogLocator(subs=(1, 2, 5)).tick_values(low, high)
    if sum(low <= tick <= high for tick in candidates) < 3:
        candidates = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    axis.set_major_locator(FixedLocator([tick for tick in candidates if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def label_of(name: str, longest: int = 22) -> str:
    """``name`` on one line, cut in the middle when it is too long for a plot."""
    line = " ".join(name.split())
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]}…{line[-half + 1 :]}"


def _for_the_page(svg: str, title: str, prefix: str) -> str:
    """Cuts the file header, scopes the ids, and swaps fixed colours and fonts for the page's own."""
    svg = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="[^"]+"', svg)
    head = f'<svg class="plot" {box.group() if box else ""} role="img" aria-label="{escape(title)}"'
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index(">") + 1 :], flags=re.DOTALL)
    swaps: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
        (r'\bid="', f'id="{prefix}-'),
        (r'href="#', f'href="#{prefix}-'),
        (r"url\(#", f"url(#{prefix}-"),
        ("|".join(INK), lambda match: INK[match.group()]),
        ("'DejaVu Sans'", "var(--sans)"),
    ]

    def inside_tag(
        tag: re.Match[str],
    ) -> str:  # not in the text between tags: a method may be called "#010101"
        text = tag.group()
        for pattern, swap in swaps:
            text = re.sub(pattern, swap, text)
        return text

    return f'{head} xmlns:xlink="http://www.w3.org/1999/xlink">' + re.sub(r"<[^>]+>", inside_tag, body)
