"""Two updates of a distillation, and what they need: before days are spent."""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.table import Table

from .options import DistillOptions
from .roles import Roles
from .run_log import RunLog
from .shards import size_of

UPDATES = 2


@dataclass(frozen=True)
class Needs:
    """What a run needs.

    Attributes:
        update_s: seconds of the last update of the student, with the turns of other roles before it.
        peak_bytes: most memory in use: the accelerator's, or the process's where there is none.
        checkpoint_bytes: on disk, for one checkpoint.
    """

    update_s: float
    peak_bytes: int
    checkpoint_bytes: int


@contextmanager
def scratch(options: DistillOptions) -> Iterator[DistillOptions]:
    """The options of a try in a folder that all processes share, and that is gone afterwards."""
    state = PartialState()
    folder = [tempfile.mkdtemp() if state.is_main_process else ""]
    broadcast_object_list(folder)
    changes = {
        "output_dir": Path(folder[0]),
        "cache_dir": None,
        "max_train_steps": UPDATES,
        "resume_from_checkpoint": None,
    }
    try:
        yield options.model_copy(update=changes)
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            shutil.rmtree(folder[0], ignore_errors=True)


def measured_needs(folder: Path, device: torch.device) -> Needs:
    """What the run in a folder needed."""
    lines = list(RunLog(folder).lines())
    checkpoint = max((path for path in folder.glob("checkpoint-*")), key=lambda path: path.stat().st_mtime)
    on_disk = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    return Needs(float(lines[-1]["seconds"]), peak_bytes(device), on_disk)


def peak_bytes(device: torch.device) -> int:
    """Most memory in use so far: the accelerator's, or the process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table_of(roles: Roles) -> Table:
    """Roles with what they train."""
    table = Table(title="dry run", title_justify="left")
    for heading in ("role", "is", "trained tensors", "trained parameters"):
        table.add_column(heading, justify="left" if heading in ("role", "is") else "right")
    for name, kind in roles.kinds.items():
        trained = roles.trainable(name).values() if name in roles.trained else ()
        table.add_row(name, type(kind).__name__, f"{len(trained):,}", f"{size_of(trained):,}")
    return table


def in_words(needs: Needs, updates: int) -> str:
    """What a whole run of so many updates needs."""
    hours = needs.update_s * updates / 3600
    return (
        f"{needs.update_s:.3g} s an update, {hours:.3g} hours for {updates:,}; "
        f"{needs.peak_bytes / 2**20:,.0f} MiB of memory; {needs.checkpoint_bytes / 2**20:,.1f} MiB a checkpoint"
    )
