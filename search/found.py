"""What a search found, as data: JSON is the truth, the report is derived from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationError

from ..eval.jackknife import Estimate
from ..samplers import InputError, Plan
from ..samplers.files import read_json, write_json
from .space import plan_key

State = Literal["complete", "pruned", "failed"]


def _as_plan(value: Any) -> Plan:
    return value if isinstance(value, Plan) else Plan.from_json(value)


AnyPlan = Annotated[Plan, PlainValidator(_as_plan), PlainSerializer(Plan.to_json)]


@dataclass(frozen=True)
class Scored:
    """A plan as it was measured once.

    Attributes:
        n: images.
        quality: what the search is for.
        others: other metrics, by name.
        costs: ``nfe``, ``flops``, ``latency_s``, as far as measured, per image.
    """

    n: int
    quality: Estimate
    others: Mapping[str, Estimate] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """A plan that the search tried, or that the found one is compared with.

    Attributes:
        order: number of the trial, from 0; negative when it was none.
        plan: the plan.
        params: what the trial suggested.
        state: ``complete`` when all of its images were made, ``pruned`` when a rung before the last ended it,
            ``failed`` when it could not be measured.
        at_search: on the seeds of the search, at the last number of images that it reached; None when it failed.
        fresh: on seeds that the search never saw; None where that was not measured.
        holds: whether every limit holds.
        reason: why it failed or was pruned.
        name: what the report calls it.
        timesteps: at which the network is evaluated, in the order of the steps, on the scale of the scheduler.
        log_snrs: of these times, as many and finite; a time without signal has the lowest that there is.
        gap: ``fresh.quality`` minus that of the plan found, paired on the same seeds.
    """

    order: int
    plan: AnyPlan
    params: dict[str, Any]
    state: State = "complete"
    at_search: Scored | None = None
    fresh: Scored | None = None
    holds: bool = True
    reason: str | None = None
    name: str | None = None
    timesteps: tuple[float, ...] = ()
    log_snrs: tuple[float, ...] = ()
    gap: Estimate | None = None

    def __post_init__(self) -> None:
        if len(self.timesteps) != len(self.log_snrs):
            raise InputError(
                f"{self.title} has a log-SNR for each timestep; got {len(self.timesteps)} timesteps and "
                f"{len(self.log_snrs)} log-SNRs"
            )
        if self.order >= 0 and (self.state == "failed") != (self.at_search is None):
            raise InputError(f"{self.title} is {self.state}; a trial has a score of the search unless it failed")
        if self.state == "failed" and not self.reason:
            raise InputError(f"{self.title} failed; give the reason")

    @property
    def title(self) -> str:
        """Its name, or the number of its trial."""
        return self.name or self.plan.name or f"trial {self.order}"


@dataclass(frozen=True)
class Transfer:
    """A measurement in another setting than that of the search.

    Attributes:
        setting: in words, such as ``guidance scale 3``.
        name: what was measured there.
        scored: on fresh seeds.
    """

    setting: str
    name: str
    scored: Scored


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        plan: the plan found, with its evidence.
        metric: name of the quality.
        higher_is_better: its direction.
        cost: the second objective, a name in the costs; None when quality was the only one.
        front: the best candidates, re-measured: a front of quality and cost in order of cost, or with one objective
            those that led, the best first. The plan found is one of them.
        history: all finished trials in their order.
        baselines: what the plan is compared with, by name.
        teacher: the plan that it is to come near; None without one.
        transfers: the plan, and others beside it, in other settings.
        spent: rows that went through the network to measure, the teacher's included, over all sittings.
        seconds: time from start to end, over all sittings.
        settings: what it was searched with, as JSON data; the report leads with ``pipe``, ``steps``, ``objective``,
            ``limits``, ``space``, ``seeds`` and ``fresh_seeds`` (first, and one past the last).
        command: that started it.
    """

    plan: AnyPlan
    metric: str
    higher_is_better: bool
    cost: str | None
    front: tuple[Candidate, ...]
    history: tuple[Candidate, ...]
    spent: int
    seconds: float
    baselines: tuple[Candidate, ...] = ()
    teacher: Candidate | None = None
    transfers: tuple[Transfer, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    def __post_init__(self) -> None:
        key = plan_key(self.plan)
        if all(plan_key(candidate.plan) != key for candidate in self.front):
            raise InputError(f"the plan found is one of the front; got another than its {len(self.front)}")
        for candidate in self.front:
            if candidate.at_search is None:
                raise InputError(f"{candidate.title} of the front has no score of the search")
            if self.cost is not None and self.cost not in candidate.at_search.costs:
                raise InputError(f"{candidate.title} of the front has no {self.cost}, which is an objective")

    @property
    def best(self) -> Candidate:
        """The plan found, with its measurements."""
        key = plan_key(self.plan)
        return next(candidate for candidate in self.front if plan_key(candidate.plan) == key)

    def to_json(self) -> dict[str, Any]:
        """The search as JSON data; of an estimate value, error and n are kept."""
        data: dict[str, Any] = _Document(fewstep_found=1, found=self).model_dump(mode="json")
        return data

    @classmethod
    def from_json(cls, data: Any, source: str = "search") -> Found:
        """The search in JSON data.

        Args:
            data: what ``to_json`` gives.
            source: what error messages call it.

        Raises:
            InputError: one line that names the place and the value.
        """
        try:
            return _Document.model_validate(data).found
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(step) for step in first["loc"]) or "the whole"
            message = first["msg"].removeprefix("Value error, ")
            got = "" if first["type"] in ("missing", "value_error") else f"; got {repr(first['input'])[:60]}"
            raise InputError(f"{source} is no found search ({where}: {message}{got})") from None

    def save(self, path: str | Path) -> None:
        """Writes the search as JSON; the file is complete or absent."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Found:
        """Reads a search from a JSON file.

        Raises:
            InputError: when the file is missing, not JSON, or no found search.
        """
        return cls.from_json(read_json(Path(path)), str(path))


class _Document(BaseModel):
    """A found search in a file, with the version of the format."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    fewstep_found: Literal[1]
    found: Found
