"""``fewstep distill``: train a student that samples in few steps."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from ..distill.commandline import method_lines, method_parser, run_method


def distill_parser() -> ArgumentParser:
    """The parser of ``fewstep distill``, still without its methods."""
    return ArgumentParser(description="Train a student that samples in few steps.", exit_on_error=False)


def add_distill_methods(parser: ArgumentParser) -> None:
    """Adds the methods of ``fewstep distill``, which jsonargparse wants after their parser was added itself."""
    commands = parser.add_subcommands(dest="action", metavar="METHOD", required=True)
    for name, text in method_lines():
        commands.add_subcommand(name, method_parser(name), help=text)


def run_distill_command(parsed: Namespace, command: str) -> int:
    """Distils by the chosen method; returns the exit status."""
    return run_method(parsed.action, parsed[parsed.action], command)
