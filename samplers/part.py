"""What a plan is made of: slots, the parts that fill them, and the run that the parts prepare.

A new method is one file: a frozen subclass of `Part`, registered in its slot's registry. A new slot is
a registry in its own file and one field of `Plan`.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema
from torch import nn

from .cache_call import CacheHook
from .call import CallHook
from .errors import InputError
from .explicit_base import GridAdapter
from .files import file_beside
from .network import Addition
from .process import Process
from .registry import Registry
from .stats import Stats


class Sampling(Protocol):
    """The pipeline as a part sees it that decides over whole calls."""

    def run(self, arguments: dict[str, Any], grid: GridAdapter | None = None) -> Any:
        """One call of the pipeline by the rest of the plan.

        Args:
            arguments: those of the call, by name.
            grid: an explicit grid that runs instead of the plan's, or None.

        Returns:
            The pipeline's output.
        """

    def add(self, stats: Stats) -> None:
        """Adds what another attached pipeline spent to the count of this call."""


Around = Callable[[dict[str, Any], Sampling], Any]
"""From the call's arguments by name and the sampling to the pipeline's output."""


@dataclass
class Run:
    """What an attached pipeline will do: filled by the parts of a plan before the pipeline is touched.

    Attributes:
        pipe: the pipeline, to look at and never to change; with the networks of `replace_network` in it.
        own_pipe: the pipeline as the user handed it over.
        scheduler: a scheduler of our own, which the parts may change.
        timesteps: the explicit grid, or None for the scheduler's own.
        call_arguments: arguments that the plan sets in every call of the pipeline.
        hooks: makers of what the parts do during a call; each is asked for a fresh one at the start of a call. An
            evaluation goes through the hooks in this order.
        arounds: what decides over whole calls, outermost first.
        caches: makers of what the caches do during a call, as with hooks; they are beneath all hooks.
        additions: what layers of the pipeline's networks add to their outputs, by component name, beneath the caches.
        networks: networks that take the place of the pipeline's own while the plan is attached, by component name.
        resources: objects that the user handed to ``attach`` by name, such as networks.
        folder: the folder of the plan's file, where files that it names are; None for a plan that was not loaded.
        warnings: sentences the user should read.
        notes: sentences on what parts found in their files, for `doctor`.
    """

    pipe: Any
    scheduler: Any
    timesteps: tuple[float, ...] | None = None
    call_arguments: dict[str, Any] = field(default_factory=dict)
    hooks: list[Callable[[], CallHook]] = field(default_factory=list)
    arounds: list[Around] = field(default_factory=list)
    caches: list[Callable[[], CacheHook]] = field(default_factory=list)
    additions: dict[str, dict[nn.Module, tuple[Addition, ...]]] = field(default_factory=dict)
    networks: dict[str, nn.Module] = field(default_factory=dict)
    resources: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    own_pipe: Any = field(init=False)
    _claimed: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.own_pipe = self.pipe

    def replace_network(self, component: str, network: nn.Module) -> None:
        """Has ``network`` run as the pipeline's ``component`` while the plan is attached."""
        self.networks[component] = network
        self.pipe = copy.copy(self.pipe)
        self.pipe.__dict__[component] = network

    def claim(self, part: str, modules: Mapping[str, nn.Module]) -> None:
        """Notes that a cache decides about some modules.

        Args:
            part: the cache, as the user knows it.
            modules: by name.

        Raises:
            InputError: when another one does already.
        """
        for name, module in modules.items():
            if id(module) in self._claimed:
                raise InputError(
                    f"the {self._claimed[id(module)]} and the {part} cache both decide about {name}; keep one of them"
                )
        self._claimed |= {id(module): part for module in modules.values()}

    @property
    def process(self) -> Process:
        """The forward process of the scheduler as it stands.

        Raises:
            InputError: when the scheduler is not known.
        """
        return Process.from_scheduler(self.scheduler)

    def resource(self, part: str, name: str) -> Any:
        """The object that the user handed over as ``name``.

        Args:
            part: the part that asks, as the user knows it.
            name: the resource.

        Raises:
            InputError: when there is none.
        """
        if name not in self.resources:
            raise InputError(
                f"the {part} part needs {name!r}; hand it over with attach(pipe, plan, resources={{{name!r}: ...}})"
            )
        return self.resources[name]

    def file(self, part: str, name: str) -> Path:
        """The file called ``name`` beside the plan.

        Args:
            part: the part that asks, as the user knows it.
            name: its name within the plan's folder.

        Raises:
            InputError: when the plan was not loaded from a file, the name leads out of its folder, or there is no
                such file.
        """
        return file_beside(self.folder, f"{part} part", name, "plan")

    def set_argument(self, part: str, name: str, value: Any, known: frozenset[str]) -> None:
        """Sets one argument of the pipeline's call.

        Args:
            part: the part that asks, as the user knows it.
            name: the argument.
            value: its value.
            known: the arguments that the pipeline takes.

        Raises:
            InputError: when the pipeline takes no such argument.
        """
        if name not in known:
            raise InputError(
                f"{type(self.pipe).__name__} takes no argument {name!r}; remove the {part} part from the plan"
            )
        self.call_arguments[name] = value


class Member(BaseModel):
    """One entry of a slot: frozen data that validates itself and says under which name it is registered."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    type: str


class Part(Member):
    """One part of a plan, which prepares a run."""

    @property
    def files(self) -> tuple[str, ...]:
        """Files and folders beside the plan that this part reads."""
        return ()

    @abstractmethod
    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Writes into ``run`` what this part asks for.

        Args:
            run: what the attached pipeline will do so far.
            known_arguments: the names of the arguments that the pipeline's call takes.

        Raises:
            InputError: when the part cannot work on this pipeline; the pipeline has not been touched then.
        """


class Slot:
    """Annotation of a document's field: it holds None, or a member of ``registry`` that its ``type`` names.

    Args:
        registry: of the members.
        many: whether the field holds a list of them; a member by itself stands for a list of one.
    """

    def __init__(self, registry: Registry[Any], many: bool = False) -> None:
        self.registry = registry
        self.many = many

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate_many if self.many else self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: [part.model_dump() for part in value] if self.many else value and value.model_dump()
            ),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        parts = [self.registry[name].model_json_schema() for name in self.registry.names()]
        if self.many:
            return {"type": "array", "items": {"oneOf": parts}}
        return {"oneOf": [*parts, {"type": "null"}]}

    def _validate(self, value: Any) -> Member | None:
        if value is None or isinstance(value, Member):
            return value
        if not isinstance(value, dict) or "type" not in value:
            raise InputError(f"a {self.registry.what} is an object with a 'type'; got {value!r}")
        member: type[Member] = self.registry[str(value["type"])]
        return member.model_validate(value)

    def _validate_many(self, value: Any) -> tuple[Member, ...]:
        if isinstance(value, Member):
            return (value,)
        if not isinstance(value, list | tuple):
            raise InputError(f"a list of {self.registry.what}s is expected; got {value!r}")
        return tuple(part for part in map(self._validate, value) if part is not None)


class Record(BaseModel):
    """A frozen group of facts in a plan that nothing runs on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="after")
    def _not_empty(self) -> Record:
        if not self.model_dump(exclude_none=True):
            raise ValueError(f"{type(self).__name__} is empty; leave it out")
        return self
