"""What a distillation method is: losses by role, and the schedule of who is updated when."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ..samplers import Plan
from ..samplers.process import Process
from ..samplers.registry import Registry
from .role_kinds import Kind
from .schedule import Schedule

Needs = Literal["data", "conditions", "pairs"]
"""What a method eats: clean samples, prompts or labels alone, or pairs of noise and what the teacher made of it."""


class TrainedRoles(Protocol):
    """The networks of a run, as the training loop sees them."""

    def trainable(self, role: str, /) -> Mapping[str, nn.Parameter]:
        """The parameters that a role trains, by name, in a fixed order."""

    def update_ema(self, role: str, /, decay: float) -> None:
        """Moves an average towards the role it follows."""

    def state(self) -> Mapping[str, Tensor]:
        """All tensors that a checkpoint has to hold, on the CPU, no two of them sharing memory."""

    def load_state(self, state: Mapping[str, Tensor], /) -> None:
        """Takes what `state` gave."""


class Movable(Protocol):
    """A batch, of whatever the method takes."""

    def to(self, device: torch.device, /) -> Any:
        """The same on a device."""


class Source(Protocol):
    """Where batches come from."""

    def batch(self, index: int, positions: range, /) -> Movable:
        """Some rows of a global batch.

        Args:
            index: number of the global batch. The same index and position give the same sample in every run.
            positions: which rows; what they hold does not depend on which others are asked for.
        """


@dataclass(frozen=True)
class Loss:
    """One term of a turn.

    Attributes:
        term: its name in the log.
        role: whose parameters it trains. No others receive a gradient from it.
        value: (B,), float32, one loss per sample; their mean is what is minimised.
        parts: what the value is made of, each (B,), for the log: terms that share a forward pass are one loss.
    """

    term: str
    role: str
    value: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    """When losses are asked for, and the random numbers that belong to that moment.

    All random numbers depend on the seed, the turn and the sample's position in the global batch alone. A resumed run
    draws what the uninterrupted one drew, and so does the same global batch split over processes or accumulated.

    Attributes:
        step: updates of the student (the leading role) so far.
        turn: turns of all kinds so far; each takes one global batch.
        stage: number of the schedule's stage.
        stage_step: updates of the student within the stage.
        updates: the roles that are updated in this turn. Losses of other roles must not be yielded.
        seed: of the run.
        positions: of this batch's samples in the global batch.
        device: where `rows` leaves its tensors.
    """

    step: int
    turn: int
    stage: int
    stage_step: int
    updates: tuple[str, ...]
    seed: int
    positions: range
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def generator(self) -> torch.Generator:
        """A CPU generator for decisions about the whole batch: the same in all processes and micro-batches."""
        return self._seeded("batch")

    def rows(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        """Random numbers for each sample.

        Args:
            draw: from a sample's generator to what it is given. A further call of `rows` goes on with the same
                generators.

        Returns:
            The draws, stacked, (B, ...).
        """
        return torch.stack([draw(generator) for generator in self.generators]).to(self.device)

    @cached_property
    def generators(self) -> list[torch.Generator]:
        """A CPU generator per sample, for laws that take these."""
        return [self._seeded(f"sample {position}") for position in self.positions]

    def _seeded(self, what: str) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(seed_of(self.seed, self.turn, what))


def seed_of(*parts: object) -> int:
    """A seed, in [0, 2^63), that the parts alone decide."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class Method(BaseModel, ABC):
    """A way to distil: frozen data, its fields are the hyper-parameters.

    A new method is one file: a subclass with a literal ``type``, registered in `METHODS` by that name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    lora_rank: ClassVar[int] = 0
    "Rank of the student's adapter where the user says none; 0 trains all weights."
    students: ClassVar[tuple[str, ...]] = ("student",)
    "Roles that the run is for, and that ship; the first is the one that `plan` samples."

    type: str

    @property
    def needs(self) -> Needs:
        """What it is trained with; a class variable where the fields do not decide."""
        return "data"

    @property
    def learns_guidance(self) -> bool:
        """Whether there is nothing to learn from a pipeline that does not guide by two branches."""
        return False

    @property
    def least_updates(self) -> int:
        """Updates of the student before which it is not what `plan` says."""
        return 0

    @abstractmethod
    def kinds(self, student: Kind, network: nn.Module) -> Mapping[str, Kind]:
        """The roles of this method, ``student`` among them.

        Args:
            student: how the student holds its weights, which a critic may do likewise.
            network: the teacher's, to look at: features for a discriminator.

        Raises:
            InputError: when the method cannot train such a network.
        """

    @abstractmethod
    def plan(self, process: Process, steps: int) -> Plan:
        """How the student is sampled in some steps: solver, and grid of times at which it was trained.

        Guidance is left out; the run switches it off where ``guidance_in_student``.

        Raises:
            InputError: for a number of steps that it was not trained for, or a process that it cannot be trained on.
        """

    @property
    def guidance_in_student(self) -> bool:
        """Whether the student has the teacher's guidance in its weights, and is sampled without."""
        return True

    def fitted(self, network: nn.Module) -> nn.Module:
        """The network that the roles are made of: the teacher's, or one with more inputs that predicts the same.

        Raises:
            InputError: when it cannot be given what the method needs.
        """
        return network

    @abstractmethod
    def losses(self, batch: Any, roles: Any, moment: Moment) -> Iterator[Loss]:
        """The losses of a turn, each backpropagated before the next one is asked for.

        Yield outside of ``torch.no_grad``. A loss must depend on the parameters of its role.

        Args:
            batch: what the source gave for ``moment.positions``, on the device.
            roles: the networks.
            moment: counters and random numbers.
        """

    @abstractmethod
    def turns(self) -> Schedule:
        """Which roles are updated when, with which learning rates, and which averages follow."""

    def enter_stage(self, stage: int, roles: Any) -> None:
        """Called once before the first turn of each stage but the first, to copy the student into the teacher, say.

        What it changes must be part of the state of ``roles``.
        """


METHODS: Registry[type[Method]] = Registry("distillation method")
"""All methods, by name."""
