"""``fewstep plans``: what ships, what a plan or a recipe says, and whether it is one."""

from __future__ import annotations

import json
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from ..eval.assets import DEMO_TOKENS, PREFIX, file_of, named_plans, shipped_plans
from ..samplers import Plan
from ..samplers.errors import InputError
from ..samplers.files import read_json
from ..samplers.part import Slot
from ..samplers.tokens import RECIPES, Recipe

_WHICH = "plan or recipe file, or a name that `fewstep plans ls` lists"


def plans_parser() -> ArgumentParser:
    """The parser of ``fewstep plans``, still without its actions."""
    return ArgumentParser(description="List, show and validate plans.", exit_on_error=False)


def add_plans_actions(parser: ArgumentParser) -> None:
    """Adds the actions of ``fewstep plans``, which jsonargparse wants after their parser was added itself."""
    commands = parser.add_subcommands(dest="action", metavar="ACTION", required=True)
    listing = ArgumentParser(description="List the plans that ship and the types of parts.", exit_on_error=False)
    commands.add_subcommand("ls", listing, help="plans that ship, and the types of parts")
    show = ArgumentParser(description="Print a plan or a recipe.", exit_on_error=False)
    show.add_argument("plan", help=_WHICH)
    commands.add_subcommand("show", show, help="print a plan or a recipe")
    validate = ArgumentParser(
        description="Check plans and recipes; the exit status is 2 when one is bad.", exit_on_error=False
    )
    validate.add_argument("plan", nargs="+", help=_WHICH)
    commands.add_subcommand("validate", validate, help="check plans; exit status 2 when one is bad")


def run_plans_command(parsed: Namespace, command: str) -> None:
    """Runs the chosen action."""
    console = Console()
    if parsed.action == "ls":
        _list(console)
    elif parsed.action == "show":
        data = find_document(parsed.show.plan).to_json()
        console.print_json(json.dumps(data))
    else:
        for name in parsed.validate.plan:
            find_document(name)
            console.print(f"{name}: valid", highlight=False, soft_wrap=True)


def find_document(name: str) -> Plan | Recipe:
    """A plan or a recipe by file, or by the name of one that ships; a recipe also by that of a preset.

    Raises:
        InputError: when it is neither, or not valid.
    """
    if name in RECIPES:
        return RECIPES[name]
    path = file_of("plan", name, {**named_plans(), **named_recipes()}, RECIPES.names())
    data = read_json(path)
    kind = Recipe if isinstance(data, dict) and "fewstep_recipe" in data else Plan
    return kind.load(path)


def find_plan(name: str) -> Plan:
    """A plan by file, or by the name of one that ships.

    Raises:
        InputError: when it is neither, a recipe, or not valid.
    """
    found = find_document(name)
    if isinstance(found, Recipe):
        raise InputError(f"{name} is a recipe for token models; give a plan")
    return found


def named_recipes() -> dict[str, Path]:
    """Files of all recipes that ship, by the name ``DEMO/STEM``."""
    demo = DEMO_TOKENS.removeprefix(PREFIX)
    return {f"{demo}/{path.stem}": path for path in shipped_plans(DEMO_TOKENS)}


def _list(console: Console) -> None:
    plans = Table(title="plans that ship", title_justify="left")
    for heading in ("plan", "solver", "grid", "steps"):
        plans.add_column(heading, no_wrap=True)
    for name, path in named_plans().items():
        plan = Plan.load(path)
        data = plan.to_json()
        solver = data.get("solver", {}).get("scheduler", data.get("solver", {}).get("type", "the pipeline's"))
        plans.add_row(
            name,
            solver,
            data.get("grid", {}).get("type", "the pipeline's"),
            str(plan.nominal_steps or ""),
        )
    console.print(plans)
    parts = Table(title="parts of a plan", title_justify="left")
    parts.add_column("part")
    parts.add_column("types")
    for name, types in part_types().items():
        parts.add_row(name, ", ".join(types))
    console.print(parts)
    recipes = Table(title="recipes for token models", title_justify="left", show_header=False)
    recipes.add_row("that ship", ", ".join(named_recipes()))
    recipes.add_row("presets", ", ".join(RECIPES.names()))
    console.print(recipes)


def part_types() -> dict[str, list[str]]:
    """Registered types of each part of a plan."""
    return {
        name: slot.registry.names()
        for name, field in Plan.model_fields.items()
        for slot in field.metadata
        if isinstance(slot, Slot)
    }
