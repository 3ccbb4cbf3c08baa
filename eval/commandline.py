"""Command lines from dataclasses: typed flags, configuration files, and errors of one line."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from ..samplers.errors import InputError, unknown_name

Options = TypeVar("Options")

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Flag:
    """Annotation of an option: its help text, and what stands for its value there.

    An option of type ``tuple[X, ...]`` takes several values after its flag; one that is empty by default and not of
    paths may be given several times, and has the values of all.
    """

    help: str
    metavar: str | None = None


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help that keeps the lines of examples. jsonargparse gives the parser of a command that of its parent."""

    def _get_type_str(self, action: argparse.Action) -> str | None:
        text: str | None = super()._get_type_str(action)
        return re.sub(r"<class '(\w+)'>", r"\1", text) if text else text


def options_parser(options: type, description: str, epilog: str = "") -> ArgumentParser:
    """A parser with one flag for each field of ``options``, and ``--config`` and ``--print_config``.

    Args:
        options: a dataclass whose fields are ``Annotated[type, Flag(...)]`` and have a default.
        description: first paragraph of the help.
        epilog: last one.
    """
    parser = ArgumentParser(
        description=description,
        epilog=epilog,
        exit_on_error=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML or JSON file of options; flags after it win.")
    hints = typing.get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint, flag = typing.get_args(hints[field.name])
        extra: dict[str, Any] = {"metavar": flag.metavar} if flag.metavar else {}
        if typing.get_origin(hint) is tuple:
            hint, extra["nargs"] = typing.get_args(hint)[0], "+"
            if not field.default and hint is not Path:  # jsonargparse cannot print extended paths
                extra["action"] = "extend"
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        parser.add_argument(f"--{field.name}", type=hint, default=default, help=flag.help, **extra)
    return parser


def read_options(options: type[Options], parsed: Namespace) -> Options:
    """The dataclass from what its `options_parser` parsed."""
    values = {field.name: parsed[field.name] for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def exit_status(program: str, command: Callable[[], int | None], interrupted: str) -> int:
    """Runs a command, and turns what stops it into one line on standard error and an exit status.

    Args:
        program: first word of an error message.
        command: what to run; it may return an exit status.
        interrupted: what to tell after Ctrl-C.

    Returns:
        What the command returned, 0 for None, 2 for bad input, or 130 after Ctrl-C.
    """
    try:
        return command() or 0
    except (InputError, argparse.ArgumentError) as error:
        print(f"{program}: error: {_one_line(str(error))}", file=sys.stderr)  # noqa: T201
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"\n{program}: {interrupted}", file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED


def _one_line(message: str) -> str:
    """A message as one line; flags and types by the names that the user gave them."""
    line = " ".join(message.split())
    if choice := re.fullmatch(r"argument (\w+): invalid choice: '(.*?)' \(choose from (.*)\)", line):
        what, name, known = choice.groups()
        return str(unknown_name(what.lower(), name, [each.strip("' ") for each in known.split(",")]))
    line = re.sub(
        r'^expected "[\w.-]+" to be (one of .*), but it was not provided\.$', r"a command is missing; give \1", line
    )
    line = re.sub(r"arguments are required: (?:[\w-]+\.)*(\w+)$", r"arguments are required: --\1", line)
    line = re.sub(r'^Parser key "([\w.]+)":', r"--\1:", line)
    line = re.sub(r"Does not validate against any of the Union subtypes.*?\[(.*?)\].*Given value: ", _expected, line)
    line = re.sub(r"Expected an? <class '(\w+)'>\.", r"expected \1;", line)
    return re.sub(r"Expected an? typing\.Literal(\[.*?\])\.", r"expected one of \1;", line).replace("Got value:", "got")


def _expected(union: re.Match[str]) -> str:
    """The types of an option that may also be left out."""
    types = [name for name in re.findall(r"<class '(?:\w+\.)*(\w+)'>", union.group(1)) if name != "NoneType"]
    return f"expected {' or '.join(types)}; got "


def call_arguments(pairs: Sequence[str]) -> dict[str, str]:
    """``key=value`` strings as a dictionary.

    Raises:
        InputError: for an entry without ``=``, or a key that is given twice.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--call_kwargs {pair!r} is not of the form key=value; write for example height=512")
        if key in values:
            raise InputError(f"--call_kwargs gives {key!r} twice; keep one")
        values[key] = value
    return values
