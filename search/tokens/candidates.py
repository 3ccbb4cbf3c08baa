"""Recipes that differ from one in some fields."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ...samplers.errors import InputError, unknown_name
from ...samplers.tokens import Recipe

OPENING, CLOSING = "[{", "]}"


@dataclass(frozen=True)
class Variation:
    """A field of a recipe's JSON, and what it is set to.

    Attributes:
        path: names of fields and numbers of list entries, from the outside in.
        values: JSON data.
    """

    path: tuple[str, ...]
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> Variation:
        """The variation that ``unmask.threshold=0.5,0.7`` says.

        Values are JSON, or text where they are not; commas within brackets or quotes do not part them.

        Raises:
            InputError: when it is not of that form.
        """
        name, equals, values = text.partition("=")
        path = tuple(name.strip().split("."))
        if not equals or not all(path) or not values.strip():
            raise InputError(
                f"what varies is a field of the recipe and its values, such as unmask.threshold=0.5,0.7; got {text!r}"
            )
        return cls(path, tuple(map(_value, _split(values))))

    @property
    def name(self) -> str:
        """The path with dots."""
        return ".".join(self.path)

    @property
    def order(self) -> int:
        """What replaces something whole comes before what changes a part of it."""
        return len(self.path) - (self.path[-1] == "type")


def _split(text: str) -> list[str]:
    """The text in parts, at commas outside of brackets and quotes."""
    parts, depth, quoted, escaped = [""], 0, False, False
    for character in text:
        if character == '"' and not escaped:
            quoted = not quoted
        escaped = character == "\\" and not escaped
        if not quoted:
            depth += (character in OPENING) - (character in CLOSING)
        if character == "," and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text.strip()


@dataclass(frozen=True)
class RecipeCandidate:
    """A recipe to be measured.

    Attributes:
        recipe: without a name and without evidence.
        changes: what was set to make it, by the name of the variation.
    """

    recipe: Recipe
    changes: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The changes in words."""
        return title_of(self.changes)


@dataclass(frozen=True)
class Refused:
    """Changes that gave no recipe, or one that the models cannot run.

    Attributes:
        changes: as of `RecipeCandidate`.
        reason: why.
    """

    changes: Mapping[str, Any]
    reason: str

    @property
    def title(self) -> str:
        """The changes in words."""
        return title_of(self.changes)


@dataclass(frozen=True)
class Candidates:
    """What a search chooses from.

    Attributes:
        recipes: all different.
        refused: what could not be made.
        merged: how many made a recipe that was there already.
    """

    recipes: tuple[RecipeCandidate, ...]
    refused: tuple[Refused, ...] = ()
    merged: int = 0


def title_of(changes: Mapping[str, Any]) -> str:
    """Changes in words."""
    words = (
        f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
        for name, value in changes.items()
    )
    return " ".join(words) or "the recipe as it is"


def unnamed(recipe: Recipe) -> Recipe:
    """The recipe without its name and its evidence, which say nothing about what it does."""
    return recipe.replace(name=None, evidence=())


def vary(base: Recipe, variations: Sequence[Variation]) -> Candidates:
    """Every combination of the values of the variations, put into a recipe.

    Where the ``type`` of a policy is set to another than it has, the new policy has its own defaults.

    Args:
        base: the recipe; its name and evidence are left behind.
        variations: of its fields; without any, the recipe is the only candidate.

    Raises:
        InputError: when a field is varied twice, or no combination is a recipe.
    """
    names = [variation.name for variation in variations]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{doubled} is varied twice; give its values together")
    plain = unnamed(base)
    ordered = sorted(variations, key=lambda variation: variation.order)
    found: dict[Recipe, RecipeCandidate] = {}
    refused, merged = [], 0
    for values in product(*(variation.values for variation in variations)):
        changes = dict(zip(names, values, strict=True))
        data = plain.model_dump(mode="json", by_alias=True)
        try:
            for variation in ordered:
                _set(data, variation.path, changes[variation.name])
            recipe = Recipe.from_json(data)
        except InputError as error:
            refused.append(Refused(changes, str(error)))
            continue
        recipe = recipe if base.folder is None else recipe.beside(base.folder)
        merged += recipe in found
        found.setdefault(recipe, RecipeCandidate(recipe, changes))
    if not found:
        raise InputError(f"none of {len(refused)} combinations is a recipe; {refused[0].title}: {refused[0].reason}")
    return Candidates(tuple(found.values()), tuple(refused), merged)


def _set(data: Any, path: tuple[str, ...], value: Any) -> None:
    """Sets a place in JSON data; a new type leaves nothing of the old object."""
    *outer, last = path
    place = data
    for depth, name in enumerate(outer):
        if isinstance(place, dict) and name not in place:
            raise unknown_name(f"field of {'.'.join(path[:depth]) or 'the recipe'}", name, place)
        place = place[_key(place, name, path[:depth])]
    key = _key(place, last, tuple(outer))
    if last == "type" and place.get("type") != value:
        place.clear()
    place[key] = value


def _key(place: Any, name: str, so_far: tuple[str, ...]) -> Any:
    """``name`` as a key of an object, where it may be new, or as a number of a list."""
    if isinstance(place, dict):
        return name
    where = ".".join(so_far)
    if not isinstance(place, list):
        raise InputError(f"{where} is {place!r}, which has no {name!r} in it")
    if not name.isdigit() or int(name) >= len(place):
        raise InputError(f"{where} has {len(place)} entries, numbered from 0; got {name!r}")
    return int(name)
