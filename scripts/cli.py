"""The command ``fewstep``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from jsonargparse import ArgumentParser, Namespace

from ..eval.commandline import HelpFormatter, exit_status
from .bench_command import bench_parser, run_bench_command
from .distill_command import add_distill_methods, distill_parser, run_distill_command
from .doctor_command import doctor_parser, run_doctor_command
from .plans_command import add_plans_actions, plans_parser, run_plans_command
from .sample_command import run_sample_command, sample_parser
from .search_command import add_search_actions, run_search_command, search_parser, with_action

PROGRAM = "fewstep"

COMMANDS: dict[str, Callable[[Namespace, str], int | None]] = {
    "bench": run_bench_command,
    "doctor": run_doctor_command,
    "sample": run_sample_command,
    "search": run_search_command,
    "distill": run_distill_command,
    "plans": run_plans_command,
}
"Every command, and what runs it with its parsed flags and the command line, for an exit status if not 0."


def make_parser(words: Sequence[str] | None = None) -> ArgumentParser:
    """The parser of all commands.

    Args:
        words: of the command line that it will read. The options of all methods of distillation take half a second to
            make, and are left out where no word asks for them; None to leave out nothing.
    """
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Sample diffusion models in few steps, and measure what that cost.",
        version=version(PROGRAM),
        exit_on_error=False,
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subcommands(dest="command", metavar="COMMAND", required=True)
    commands.add_subcommand("bench", bench_parser(), help="score and time plans beside diffusers' own samplers")
    commands.add_subcommand("doctor", doctor_parser(), help="what will run on a pipeline, what will not, and why")
    commands.add_subcommand("sample", sample_parser(), help="make a grid of images with a plan")
    search = search_parser()
    commands.add_subcommand("search", search, help="find a plan for a pipeline, or fit a part of one")
    add_search_actions(search)
    distill = distill_parser()
    commands.add_subcommand("distill", distill, help="train a student that samples in few steps")
    if words is None or "distill" in words:
        add_distill_methods(distill)
    plans = plans_parser()
    commands.add_subcommand("plans", plans, help="list, show and validate plans")
    add_plans_actions(plans)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, a command's own, 2 for bad input, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)

    def command() -> int | None:
        parsed = make_parser(given).parse_args(with_action(given))
        return COMMANDS[parsed.command](parsed[parsed.command], shlex.join([PROGRAM, *given]))

    return exit_status(PROGRAM, command, "stopped; the same command continues where it stopped")


if __name__ == "__main__":
    sys.exit(main())
