"""What a report shows of the images: those of the first seeds, and those that are farthest from the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .pictures import Picture, find_pictures
from .report_runs import Bench, Run

WORST = 8
CRISP_SIDE = 48  # pixels; up to here images are shown two or three times enlarged


def image_samples(out: Path, bench: Bench, seeds: Sequence[int]) -> dict[str, Any]:
    """What report_images.html prints.

    Args:
        out: folder of the bench.
        bench: its runs.
        seeds: to be shown.

    Raises:
        InputError: when a shard is damaged or belongs to another run.
    """
    pictures = {run.name: _pictures(out, bench, run, seeds) for run in bench.runs}
    shown = {seed: [pictures[run.name][seed] for run in bench.runs if seed in pictures[run.name]] for seed in seeds}
    worst = [run for run in bench.runs if run.worst and bench.reference]
    widest = max((picture.width for column in pictures.values() for picture in column.values()), default=0)
    zoom = 1 if widest > CRISP_SIDE else 2 if len(bench.runs) > 8 else 3
    return {
        "pictures": pictures,
        "seeds": [seed for seed in seeds if shown[seed]],
        "conditions": {seed: pictures_[0].condition for seed, pictures_ in shown.items() if pictures_},
        "shrunk": any(picture.shrunk for column in pictures.values() for picture in column.values()),
        "zoom": zoom,
        "cell_px": zoom * widest,
        "worst": worst,
        "worst_columns": min(WORST, max((len(run.worst) for run in worst), default=0)),
    }


def _pictures(out: Path, bench: Bench, run: Run, seeds: Sequence[int]) -> dict[int, Picture]:
    """What the two grids show of one run; of the reference also the counterparts of everyone's worst."""
    members = bench.runs if run is bench.reference else (run,)
    worst = {item.seed for member in members for item in member.worst[:WORST]} if bench.reference else set()
    return find_pictures(out / "shards" / run.config_hash, {*seeds, *worst}, run.config_hash)
