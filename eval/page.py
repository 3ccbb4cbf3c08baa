"""What the self-contained pages share: one template for the frame, and how values are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from .verdict import digits


def page_template(name: str, *folders: Path) -> Template:
    """The template ``name`` in one of some folders or in this one, which escapes all that it is given."""
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def flops(value: float) -> str:
    """Floating point operations with a prefix: ``3.21 G``."""
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{digits(value / factor)} {unit}"
    return digits(value)


def flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as names with dots, and text; what is None is left out."""
    items: list[tuple[str, str]] = []
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            items += flat(inner, f"{prefix}{key}.")
        elif inner is not None:
            text = ", ".join(str(item) for item in inner) if isinstance(inner, list) else str(inner)
            items.append((f"{prefix}{key}", text))
    return items
