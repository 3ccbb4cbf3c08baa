"""The picture of docs/tokens.md: agreement of caches along uncached trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..samplers.files import atomic_path, read_json

PICTURE = "tokens-caches.png"
CURVES = {
    "prefix": ("#b3541e", "o", "-"),
    "free": ("#8c6d31", "v", ":"),
    "dual": ("#e0902f", "s", "-"),
    "sub-block": ("#c2a878", "P", "-"),
    "dkv": ("#2e7d32", "o", "-"),
    "dkv PD": ("#7cb342", "s", "-"),
    "similarity": ("#8e44ad", "^", "-"),
    "prompt-prefill": ("#7f7f7f", "X", "-"),
    "refresh prompt": ("#0b3d91", "o", "-"),
    "refresh answer": ("#2f80ed", "s", "-"),
    "refresh prompt, answer fresh": ("#8fb8ff", "^", "-"),
    "refresh by drift": ("#12a4b3", "D", "-"),
}
"Colour, marker and line of each family; ours last, in blue."

Row = Mapping[str, Any]


def intervals(rows: Sequence[Row]) -> list[int]:
    """The refresh intervals that were measured."""
    return sorted({row["interval"] for row in rows if row["interval"]})


def share_at(row: Row, kind: str) -> float:
    """The share of the answer's positions with the same likeliest token."""
    return float(row["answer"][kind]["same"][0])


def renew(results: Path, folder: Path) -> None:
    """Draws what was measured with one token a step on the first denoiser with full attention, where it was.

    Args:
        results: the file that token_caches.py wrote.
        folder: of the picture.
    """
    found = read_json(results) if results.is_file() else {"models": {}}
    for model, about in found["models"].items():
        if about["attention"] == "full":
            chosen = [row for row in found["agreement"] if (row["model"], row["policy"]) == (model, "one")]
            draw(chosen, folder / PICTURE)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes the picture.

    Args:
        rows: of one model and one policy, as token_caches.py wrote them.
        path: of the PNG.
    """
    figure = Figure(figsize=(9.5, 8), dpi=110, layout="constrained")
    axes = figure.subplots(2, 2, sharey=True)
    for column, (kind, title) in enumerate(
        (("certain", "one answer is right"), ("dependent", "several answers are right"))
    ):
        for line, of_cost in enumerate((False, True)):
            panel: Axes = axes[line][column]
            _curves(panel, rows, kind, of_cost=of_cost)
            if not line:
                panel.set_title(title, fontsize=11)
    for panel in axes[:, 0]:
        panel.set_ylabel("same likeliest token")
    handles, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _curves(panel: Axes, rows: Sequence[Row], kind: str, *, of_cost: bool) -> None:
    for family, (colour, marker, line) in CURVES.items():
        points = [row for row in rows if row["family"] == family and (of_cost or row["interval"])]
        x = "token_forwards" if of_cost else "interval"
        if not points:
            continue
        points.sort(key=lambda row: float(row[x]))
        ours = family.startswith("refresh")
        panel.errorbar(
            [row[x] for row in points],
            [share_at(row, kind) for row in points],
            yerr=[row["answer"][kind]["same"][1] for row in points],
            label=family,
            color=colour,
            marker=marker,
            linestyle=line,
            markersize=5,
            linewidth=2.2 if ours else 1.2,
            elinewidth=0.6,
            zorder=3 if ours else 2,
        )
    if of_cost:
        panel.set_xlabel("token-forwards, as a part of those of no cache")
        panel.set_xlim(0, 1.03)
    else:
        panel.set_xscale("log", base=2)
        panel.set_xticks(intervals(rows), [str(every) for every in intervals(rows)])
        panel.set_xlabel("steps between refreshes")
    panel.grid(color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
