"""``accelerate launch -m fewstep.distill METHOD``: ``fewstep distill`` over several processes."""

from __future__ import annotations

import shlex
import sys

from jsonargparse import ArgumentParser

from ..eval.commandline import HelpFormatter, exit_status
from .commandline import method_lines, method_parser, run_method

STOPPED = "stopped; the same command with --resume_from_checkpoint latest goes on"


def main(arguments: list[str] | None = None) -> int:
    """Distils in this process, which may be one of several; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments

    def command() -> int:
        if not given or given[0].startswith("-"):
            _overview().parse_args(given or ["--help"])
        parsed = method_parser(given[0]).parse_args(given[1:])
        return run_method(given[0], parsed, f"python -m fewstep.distill {shlex.join(given)}")

    return exit_status("fewstep", command, STOPPED)


def _overview() -> ArgumentParser:
    """The parser of ``--help`` without a method."""
    lines = [f"  {name:<24}{text}" for name, text in method_lines()]
    parser = ArgumentParser(
        description="Train a student that samples in few steps; METHOD --help shows the flags of a method.",
        epilog="\n".join(["methods:", *lines]),
        exit_on_error=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("METHOD")
    return parser


if __name__ == "__main__":
    sys.exit(main())
