"""The recipe: how to decode, as data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from ..document import Document
from ..errors import InputError, first_problem
from ..part import Slot
from ..provenance import Evidence
from ..registry import Registry
from .blocks import Whole
from .denoiser import Denoiser
from .none import NoCache, NoConstraint, NoExit, NoRemask, NoScorer
from .proposal import Proposal
from .slots import (
    BLOCKS,
    CACHES,
    CONSTRAINTS,
    EXITS,
    LOGITS,
    REMASKS,
    SCORERS,
    SLOTS,
    UNMASKS,
    BlockSchedule,
    Constraint,
    Exit,
    LogitsProcessor,
    Policy,
    Remask,
    Scorer,
    TokenCache,
    Unmask,
)


class Recipe(Document):
    """How to decode tokens: the token side of a plan. Frozen; ``recipe.replace(cache=...)`` makes another.

    Raises:
        InputError: when a field is not valid, or when two policies cannot work together.
    """

    noun = "recipe"
    field_noun = "slot"

    version: Literal[1] = Field(default=1, alias="fewstep_recipe", description="Version of this format.")
    name: str | None = Field(default=None, min_length=1, max_length=100, description="What reports call it.")
    blocks: Annotated[BlockSchedule, Slot(BLOCKS)] = Field(default=Whole(), description="What is filled next.")
    unmask: Annotated[Unmask, Slot(UNMASKS)] = Field(description="What is committed in a step.")
    propose: Proposal = Field(default=Proposal(), description="How tokens are chosen.")
    exit: Annotated[Exit, Slot(EXITS)] = Field(default=NoExit(), description="When to stop early.")
    remask: Annotated[Remask, Slot(REMASKS)] = Field(default=NoRemask(), description="What is taken back.")
    cache: Annotated[TokenCache, Slot(CACHES)] = Field(default=NoCache(), description="What is not evaluated again.")
    logits: Annotated[tuple[LogitsProcessor, ...], Slot(LOGITS, many=True)] = Field(
        default=(), description="What is done to logits, in this order."
    )
    constraint: Annotated[Constraint, Slot(CONSTRAINTS)] = Field(
        default=NoConstraint(), description="What may be chosen."
    )
    scorer: Annotated[Scorer, Slot(SCORERS)] = Field(default=NoScorer(), description="Who else decides.")
    evidence: tuple[Evidence, ...] = Field(default=(), description="What was measured.")

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise InputError(first_problem(error)) from None
        for field, (registry, kind) in SLOTS.items():
            for policy in self._members(field):
                if not isinstance(policy, kind):
                    raise InputError(f"{field} holds a {registry.what}; got {policy!r}")
        for policy in self.logits:
            if self.logits.count(policy) > 1:
                raise InputError(f"the {policy.type} logits processor is there twice with the same settings; keep one")
        for policy in self.policies:
            policy.check(self)

    def _members(self, field: str) -> tuple[Any, ...]:
        value = getattr(self, field)
        return value if isinstance(value, tuple) else (value,)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """All policies, in the order of the fields."""
        return tuple(policy for field in SLOTS for policy in self._members(field))

    @property
    def file_names(self) -> tuple[str, ...]:
        """Files beside the recipe that its policies read."""
        return tuple(name for policy in self.policies for name in policy.files)

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the further evaluations that logits processors ask for."""
        return tuple(dict.fromkeys(name for processor in self.logits for name in processor.branches))

    def replace(self, **fields: Any) -> Recipe:
        """This recipe with other fields; checked like a new one. It reads the files beside this one."""
        other = Recipe(**({name: getattr(self, name) for name in type(self).model_fields} | fields))
        other._folder = self.folder
        return other

    def suits(self, denoiser: Denoiser) -> None:
        """Raises `InputError` when a policy cannot work with ``denoiser``."""
        if self.cache.keeps == "kv" and not denoiser.keeps_kv:
            raise InputError(
                f"the {self.cache.type} cache keeps keys and values, which {type(denoiser).__name__} has none of; "
                "use cache none or output"
            )
        for policy in self.policies:
            policy.suits(denoiser)


RECIPES: Registry[Recipe] = Registry("recipe")
"""Presets by name, with their papers' defaults."""
