"""``fewstep bench``."""

from __future__ import annotations

import sys

from accelerate import PartialState
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from ..eval.commandline import options_parser, read_options
from ..eval.options import BenchOptions
from ..eval.report_runs import load_bench
from ..eval.run import run_bench
from ..eval.table import bench_table

FILE_WIDTH = 140
"Columns of the table where it is not printed on a terminal."

EPILOG = """examples:
  fewstep bench                                        the demo that ships
  fewstep bench --pipe DIR --plans a.json b.json       your pipeline, its plans, diffusers' samplers
  fewstep bench --config bench.yaml --n 10000          flags after a file win
  fewstep bench --pipe demo:tokens                     recipes for token models, beside their baselines
  accelerate launch -m fewstep.eval --pipe DIR         on several GPUs

The same command continues a bench that was stopped. `fewstep plans ls` lists the plans that ship."""


def bench_parser() -> ArgumentParser:
    """The flags of ``fewstep bench``."""
    description = "Score and time plans beside diffusers' own samplers, or recipes for tokens, on the same seeds."
    return options_parser(BenchOptions, description, EPILOG)


def run_bench_command(parsed: Namespace, command: str) -> None:
    """Runs the bench, and prints its table and where the report is."""
    out = run_bench(read_options(BenchOptions, parsed), command=command)
    if PartialState().is_main_process:
        console = Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)
        console.print(bench_table(load_bench(out), console.width))
        console.print(f"{out / 'report.html'}\n{out / 'results.csv'}", highlight=False, soft_wrap=True)
