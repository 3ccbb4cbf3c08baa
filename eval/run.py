"""The bench of whatever ``--pipe`` names."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from .bench import run_bench as run_image_bench
from .options import BenchOptions
from .tokens import token_folder
from .tokens.bench import run_token_bench


def run_bench(options: BenchOptions, *, command: str = "", console: Console | None = None) -> Path:
    """Runs or continues a bench: of token models where the folder holds some, else of a pipeline of images.

    Args:
        options: what to run.
        command: the command line that runs it again, for the report.
        console: where the progress bar goes; default: standard error.

    Returns:
        ``options.out``, which then holds ``runs/*.json``, ``results.csv`` and ``report.html``.

    Raises:
        InputError: for anything the user can mend, in one line.
    """
    run = run_image_bench if token_folder(options.pipe) is None else run_token_bench
    return run(options, command=command, console=console)
