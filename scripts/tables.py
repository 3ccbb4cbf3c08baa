"""Renews what is generated: the README's table of what works, the plan schema, and documents of docs/.

Run it in a checkout: ``python -m fewstep.scripts.tables``. A test compares, so neither can go stale.
"""

from __future__ import annotations

from pathlib import Path

from diffusers.utils import logging as diffusers_logging

from ..distill import METHODS
from ..eval.assets import DEMO_TOKENS, demo_names
from ..eval.features import FEATURE_NETS
from ..samplers import Plan
from ..samplers.explicit import EXPLICIT
from ..samplers.files import write_json, write_text
from ..samplers.part import Slot
from ..samplers.solver import scheduler_names
from ..samplers.tokens import RECIPES
from . import caches_doc, cli, distill_doc, samplers_doc, schedulers_doc, search_doc, tokens_doc, tokens_picture

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- what works: generated -->", "<!-- end -->"


def works_table() -> str:
    """The README's table of what works today, in Markdown."""
    rows = [("Plan part", f"`{slot}`: `{name}`", summary) for slot, name, summary in _parts()]
    schedulers = ", ".join(f"`{name}`" for name in EXPLICIT.names())
    rows += [
        ("Solvers", f"{len(scheduler_names())} schedulers of diffusers", "by class name, through `from_config`"),
        ("Explicit grids", schedulers, "any list of timesteps, fractional ones too"),
        ("Distillation", ", ".join(f"`{name}`" for name in METHODS.names()), "`fewstep distill METHOD`"),
        ("Token recipes", ", ".join(f"`{name}`" for name in RECIPES.names()), "`fewstep.samplers.tokens.decode`"),
        ("Feature nets", ", ".join(f"`{name}`" for name in _feature_nets()), "by local path; the first ships"),
        ("Demos", ", ".join(f"`{name}`" for name in [*demo_names(), DEMO_TOKENS]), "trained models that ship"),
        ("Commands", ", ".join(f"`fewstep {name}`" for name in cli.COMMANDS), "`--help` tells"),
    ]
    lines = [f"| {kind} | {what} | {note} |" for kind, what, note in rows]
    return "\n".join(["| | what | |", "|---|---|---|", *lines])


def _parts() -> list[tuple[str, str, str]]:
    return [
        (field, name, (slot.registry[name].__doc__ or "").strip().split("\n")[0].rstrip("."))
        for field, info in Plan.model_fields.items()
        for slot in info.metadata
        if isinstance(slot, Slot)
        for name in slot.registry.names()
    ]


def _feature_nets() -> list[str]:
    from ..eval import nets  # noqa: F401  registers them

    return sorted(FEATURE_NETS.names(), key=lambda name: (name != "fashion-features", name))


def renewed(readme: str) -> str:
    """The text of the README with its table made anew."""
    head, rest = readme.split(BEGIN)
    return head + BEGIN + "\n" + works_table() + "\n" + END + rest.split(END)[1]


def main() -> None:
    """Writes the files of the checkout."""
    diffusers_logging.set_verbosity_error()  # every scheduler is built in turn, some with options that they correct
    write_text(ROOT / "README.md", renewed((ROOT / "README.md").read_text(encoding="utf-8")))
    write_json(ROOT / "samplers" / "plan.schema.json", Plan.model_json_schema())
    write_text(ROOT / "docs" / "schedulers.md", schedulers_doc.document())
    write_text(ROOT / "docs" / "samplers.md", samplers_doc.document(ROOT / samplers_doc.RESULTS))
    write_text(ROOT / "docs" / "caches.md", caches_doc.document(ROOT / caches_doc.RESULTS))
    write_text(ROOT / "docs" / "distill.md", distill_doc.document(ROOT / samplers_doc.RESULTS))
    write_text(ROOT / "docs" / "search.md", search_doc.document(ROOT / samplers_doc.RESULTS))
    write_text(ROOT / "docs" / "tokens.md", tokens_doc.document(ROOT / tokens_doc.RESULTS, ROOT / tokens_doc.FITTED))
    tokens_picture.renew(ROOT / tokens_doc.RESULTS / tokens_doc.CACHES_FILE, ROOT / "docs")


if __name__ == "__main__":
    main()
