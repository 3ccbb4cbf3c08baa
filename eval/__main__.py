"""``accelerate launch -m fewstep.eval``: ``fewstep bench`` over several processes."""

from __future__ import annotations

import shlex
import sys

from .commandline import exit_status, options_parser, read_options
from .options import BenchOptions
from .run import run_bench


def main(arguments: list[str] | None = None) -> int:
    """Runs a bench in this process, which may be one of several; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = options_parser(BenchOptions, "Score and time sampling plans; see `fewstep bench --help`.")

    def command() -> None:
        options = read_options(BenchOptions, parser.parse_args(given))
        run_bench(options, command=f"python -m fewstep.eval {shlex.join(given)}".strip())

    return exit_status("fewstep", command, "stopped; the same command continues where it stopped")


if __name__ == "__main__":
    sys.exit(main())
