"""The command line of a distillation: one flag for each option, and for each field of the method."""

from __future__ import annotations

import signal
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from rich.console import Console

from ..eval.commandline import HelpFormatter
from ..samplers.errors import InputError, first_problem
from . import methods as _methods  # noqa: F401  (registers them)
from .method import METHODS, Method
from .options import DistillOptions
from .run import distill

Model = TypeVar("Model", bound=BaseModel)


def method_parser(name: str) -> ArgumentParser:
    """The parser of one method: its own fields first, then what all methods have, ``--config`` and ``--print_config``.

    Raises:
        InputError: for an unknown method.
    """
    method = METHODS[name]
    parser = ArgumentParser(
        description=" ".join((method.__doc__ or "").split("\n\n")[0].split()),
        exit_on_error=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML or JSON file of options; flags after it win.")
    for model in (method, DistillOptions):
        for field, info in model.model_fields.items():
            if field != "type":
                _add(parser, field, info)
    return parser


def run_method(name: str, parsed: Namespace, command: str) -> int:
    """Distils by one method; returns the exit status: 0, or 143 and 130 after SIGTERM and SIGINT.

    Args:
        name: of the method.
        parsed: by its `method_parser`.
        command: as the user wrote it, for the model card.

    Raises:
        InputError: as `distill`, and for a value out of its range.
    """
    method: Method = _read(METHODS[name], parsed)
    options = _read(DistillOptions, parsed)
    outcome = distill(method, options, command, Console())
    return 0 if outcome.stopped_by is None else 128 + signal.Signals[outcome.stopped_by].value


def method_lines() -> list[tuple[str, str]]:
    """Names of all methods, each with the first sentence of what it is."""
    return [(name, (METHODS[name].__doc__ or "").split("\n")[0].rstrip(":.")) for name in METHODS.names()]


def _add(parser: ArgumentParser, name: str, info: FieldInfo) -> None:
    """One flag; a field of several values takes them after its flag."""
    hint: Any = info.annotation
    extra: dict[str, Any] = {}
    if typing.get_origin(hint) is tuple:
        hint, extra["nargs"] = typing.get_args(hint)[0], "+"
    if info.is_required():
        extra["required"] = True
    else:
        default = info.get_default()
        extra["default"] = list(default) if isinstance(default, tuple) else default
    parser.add_argument(f"--{name}", type=hint, help=info.description or name, **extra)


def _read(model: type[Model], parsed: Namespace) -> Model:
    values: dict[str, Any] = {name: parsed[name] for name in model.model_fields if name != "type"}
    try:
        return model(
            **{
                name: tuple(v) if isinstance(v, Sequence) and not isinstance(v, str) else v
                for name, v in values.items()
            }
        )
    except ValidationError as error:
        problem = first_problem(error)
        raise InputError(problem if problem.startswith("--") else f"--{problem}") from None
