"""The curves of a run, from its log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..eval.svg import plain_axes, plain_log_ticks
from ..samplers.files import atomic_path
from .run_log import RunLog

PLOT_FILE = "losses.png"

_COLUMNS, _WIDTH, _HEIGHT = 3, 4.6, 2.9
"Panels in a row, and inches of each."

_WINDOWS = 40
"A loss is smoothed over this part of the run, one in so many."

_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568")
_INK, _LINE, _FAINT, _FONT = "#4a4a4a", "#d9d9d9", 0.25, 9

_LOGARITHMIC = 8
"Axes are logarithmic where the largest value drawn is so many times the smallest."


@dataclass
class _Panel:
    """Curves that share axes: updates, values and errors, by name."""

    title: str
    smooth: bool
    curves: dict[str, tuple[list[int], list[float], list[float]]] = field(default_factory=dict)

    def add(self, curve: str, step: int, value: float, error: float) -> None:
        steps, values, errors = self.curves.setdefault(curve, ([], [], []))
        steps.append(step)
        values.append(value)
        errors.append(error)


def write_plots(folder: Path) -> Path | None:
    """Draws ``losses.png`` of a run: a panel for each term, one for the gradients, and one for each validation score.

    Args:
        folder: of the run, with its log.

    Returns:
        The picture; None when nothing has been logged.

    Raises:
        InputError: when it cannot be written.
    """
    panels = _panels(RunLog(folder).lines())
    if not panels:
        return None
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": _FONT, "text.parse_math": False}):
        figure = Figure(figsize=(columns * _WIDTH, rows * _HEIGHT), dpi=110, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes: Sequence[Axes] = np.ravel(figure.subplots(rows, columns, squeeze=False)).tolist()
        for axis, panel in zip(axes, panels, strict=False):
            _draw(axis, panel)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        path = folder / PLOT_FILE
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")
    return path


def _panels(lines: Iterable[Mapping[str, Any]]) -> list[_Panel]:
    """Terms first, then gradient norms, then validation, each in the order of their names."""
    found: dict[tuple[int, str], _Panel] = {}
    for line in lines:
        for name, value in line.items():
            place = _place(name)
            if place is None or not isinstance(value, int | float):
                continue
            order, title, curve = place
            panel = found.setdefault((order, title), _Panel(title, smooth=order < 2))
            error = line.get(name.replace(f"/{title}/", f"/{title}_se/"), 0.0) if order == 2 else 0.0
            panel.add(curve, line["step"], float(value), float(error or 0.0))
    return [found[key] for key in sorted(found)]


def _place(name: str) -> tuple[int, str, str] | None:
    """Where a value of the log is drawn: order and title of the panel, name of the curve; None for nowhere."""
    kind, _, rest = name.partition("/")
    first, _, second = rest.partition("/")
    if kind == "train":
        return 0, f"{first}: {second}", second
    if kind == "grad_norm":
        return 1, "gradient norms", rest
    if kind == "validation" and second and not first.endswith("_se"):
        return 2, first, f"{second} step{'s' * (second != '1')}"
    return None


def _draw(axes: Axes, panel: _Panel) -> None:
    plain_axes(axes, "", "")
    axes.set_title(panel.title, fontsize=_FONT, loc="left", color=_INK)
    axes.set_xlabel("updates", fontsize=_FONT - 1, color=_INK)
    axes.tick_params(labelsize=_FONT - 1, colors=_INK)
    axes.grid(visible=True, axis="y", color=_LINE, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    drawn = []
    for number, name in enumerate(sorted(panel.curves, key=_rank)):
        steps, values, errors = panel.curves[name]
        colour, y = _COLOURS[number % len(_COLOURS)], np.asarray(values)
        if panel.smooth:
            axes.plot(steps, y, color=colour, linewidth=0.7, alpha=_FAINT)
            y = _smoothed(y)
            axes.plot(steps, y, color=colour, linewidth=1.5, label=name)
        else:
            axes.errorbar(
                steps, y, yerr=2 * np.asarray(errors), color=colour, linewidth=1.3, marker="o", markersize=3.5,
                elinewidth=0.9, label=name,
            )  # fmt: skip
        drawn.append(y)
    lines = np.concatenate(drawn)
    if lines.min() > 0 and lines.max() > _LOGARITHMIC * lines.min():
        low, high = lines.min() / 1.6, lines.max() * 1.6
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        plain_log_ticks(axes.yaxis, low, high)
    if len(panel.curves) > 1:
        axes.legend(
            frameon=False, fontsize=_FONT - 1, loc="lower right", bbox_to_anchor=(1, 0.97), borderaxespad=0,
            ncols=len(panel.curves), columnspacing=1, handlelength=1, handletextpad=0.4,
        )  # fmt: skip


def _rank(name: str) -> tuple[int, str]:
    """Numbers of steps by size, names as they are spelled."""
    number = name.partition(" ")[0]
    return (int(number) if number.isdigit() else 0), name


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Means over a window that is centred where it can be."""
    reach = len(values) // (2 * _WINDOWS)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, end = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    smooth: np.ndarray = (sums[end] - sums[first]) / (end - first)
    return smooth
