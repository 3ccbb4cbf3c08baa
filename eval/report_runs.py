"""The runs of one bench folder, read and checked before anything is drawn from them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from ..samplers.errors import InputError
from ..samplers.files import read_json
from .subject import ANSWERS, IMAGES, Subject

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
FolderName = Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z_-]+$")]
NoneIsEmpty = BeforeValidator(lambda value: {} if value is None else value)


class _Record(BaseModel):
    """Frozen, finite, and open to keys that a later version adds."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Metric(_Record):
    """One score; ``se`` is one standard error in the unit of ``value``, None where none was estimated."""

    value: float
    se: NotNegative | None = None
    n: Count
    higher_is_better: bool
    net_fingerprint: str | None = None
    reference: str | None = None


class Difference(_Record):
    """A metric of the row minus the same metric of the reference, on the same seeds."""

    difference: float
    se: NotNegative | None = None


class Paired(_Record):
    """Differences to the row called ``against``, by metric."""

    against: str
    metrics: dict[str, Difference] = {}


class Floor(_Record):
    """What real images score against real images: no sampler can be expected below it."""

    value: float
    n: Count | None = None


class Latency(_Record):
    """Seconds of one call with one image: median and quartiles of the repeats."""

    median: Positive
    q1: Positive
    q3: Positive


class Throughput(_Record):
    """Images, or answers, per second at the batch size ``batch``."""

    batch: Count
    images_per_s: NotNegative


class Shares(_Record):
    """Seconds of one call by component."""

    encode_s: NotNegative = 0.0
    denoise_s: NotNegative = 0.0
    decode_s: NotNegative = 0.0
    other_s: NotNegative = 0.0


class Timing(_Record):
    """Speed and memory of one configuration; a part that was not measured is None."""

    first_call_s: NotNegative | None = None
    latency_s: Latency | None = None
    throughput: Throughput | None = None
    shares_s: Shares | None = None
    flops: Count | None = None
    peak_bytes: Count | None = None
    peak_kind: str | None = None
    weights_bytes: Count | None = None


class Worst(_Record):
    """An image that is far from the reference's image of the same seed."""

    seed: int
    feature_distance: float


class Decoding(_Record):
    """What answers of token models cost besides time and network evaluations."""

    network: str
    exact: bool
    token_forwards: NotNegative
    tokens_per_forward: NotNegative
    tokens_per_s: NotNegative | None = None
    kv_bytes: Count | None = None
    failed: Count = 0


class Run(_Record):
    """One row of the report: one file of OUT/runs."""

    format: Literal[1]
    name: Name
    role: Literal["reference", "baseline", "plan", "control"]
    config: dict[str, Any]
    config_hash: FolderName
    nfe: Positive
    n: Count
    seeds: tuple[int, int]
    metrics: Annotated[dict[Name, Metric], NoneIsEmpty] = {}
    paired: Paired | None = None
    floor: Annotated[dict[str, Floor], NoneIsEmpty] = {}
    timing: Timing | None = None
    worst: tuple[Worst, ...] = ()
    control: str | None = None
    decoding: Decoding | None = None
    env: Annotated[dict[str, Any], NoneIsEmpty] = {}
    command: str = ""
    started: str | None = None
    finished: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def latency(self) -> Latency | None:
        """Batch-1 latency, None where it was not measured."""
        return self.timing.latency_s if self.timing else None

    @property
    def network(self) -> str:
        """Which of several networks was sampled, empty where there is one."""
        return self.decoding.network if self.decoding else ""

    @property
    def pipe(self) -> str:
        """The pipeline as the configuration names it."""
        return _label(self.config.get("pipe"))

    @property
    def plan(self) -> str:
        """The plan as the configuration names it, empty when it names none."""
        return _label(self.config.get("plan"))


@dataclass(frozen=True)
class Bench:
    """The runs of one pipeline.

    Attributes:
        runs: rows in order of cost: latency where every row has one, else counted network evaluations.
        reference: the row that the others are compared with, None when there is none.
        metrics: names of all metrics, the most important first.
    """

    runs: tuple[Run, ...]
    reference: Run | None
    metrics: tuple[str, ...]

    @property
    def subject(self) -> Subject:
        """What was sampled."""
        return ANSWERS if any(run.decoding for run in self.runs) else IMAGES

    @property
    def timed(self) -> bool:
        """Whether every row has a latency, so that cost can mean time."""
        return all(run.latency for run in self.runs)

    @property
    def primary(self) -> str | None:
        """The metric that the verdict and the plots are about."""
        return self.metrics[0] if self.metrics else None

    def floor(self, metric: str) -> Floor | None:
        """The floor of ``metric``, None when no run states one."""
        return next((run.floor[metric] for run in self.runs if metric in run.floor), None)

    def difference(self, run: Run, metric: str) -> Difference | None:
        """Paired difference of ``run`` to the reference, None when it was not measured."""
        if self.reference is None or run.paired is None or run.paired.against != self.reference.name:
            return None
        return run.paired.metrics.get(metric)


# The first that is present leads the report; what is listed nowhere follows in alphabetical order.
METRIC_ORDER = (
    "worst",
    "mean",
    "accuracy",
    "fd",
    "fid",
    "kd",
    "kid",
    "precision",
    "recall",
    "density",
    "coverage",
    "class",
    "clip",
    "vendi",
    "feature",
    "lpips",
    "ssim",
    "psnr",
)


def metric_family(metric: str) -> str:
    """What a metric measures, whichever network it uses: ``fd`` for ``fd_fashion``."""
    return metric.split("_", maxsplit=1)[0].lower()


def load_bench(out: Path) -> Bench:
    """Reads and checks OUT/runs/*.json.

    Raises:
        InputError: when there is no run, a file is not a run, or the runs do not belong together.
    """
    paths = sorted((out / "runs").glob("*.json"))
    if not paths:
        raise InputError(f"{out / 'runs'} holds no run; make some with: fewstep bench --out {out}")
    runs = [_read_run(path) for path in paths]
    names = Counter(run.name for run in runs)
    repeated = [path.name for path, run in zip(paths, runs, strict=True) if names[run.name] > 1]
    if repeated:
        raise InputError(f"{out / 'runs'}: {', '.join(repeated)} hold the same name; delete or rename all but one")
    _refuse_strangers(out, runs)
    references = [run for run in runs if run.role == "reference"]
    if len(references) > 1:
        listed = ", ".join(repr(run.name) for run in references)
        raise InputError(f"{out / 'runs'} holds {len(references)} references ({listed}); keep one")
    return Bench(_by_cost(runs), references[0] if references else None, _metric_names(runs))


def _read_run(path: Path) -> Run:
    value = read_json(path)
    try:
        return Run.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        found = "" if first["type"] == "missing" else f", got {repr(first['input'])[:60]}"
        raise InputError(
            f"{path} is not a run ({where}: {first['msg']}{found}); delete it and run fewstep bench again"
        ) from None


def _refuse_strangers(out: Path, runs: Sequence[Run]) -> None:
    """Runs of several pipelines, or scores of several networks under one name, make no table."""
    _refuse_mixture(out, "pipelines", {run.name: run.pipe for run in runs}, "give each its own --out")
    for metric in _metric_names(runs):
        scored = (run for run in runs if metric in run.metrics)
        prints = {run.name: str(run.metrics[metric].net_fingerprint) for run in scored}
        _refuse_mixture(out, f"networks for {metric}", prints, "delete the older and score again")


def _refuse_mixture(out: Path, what: str, values: Mapping[str, str], mend: str) -> None:
    if len(set(values.values())) > 1:
        (one, first), (two, second) = ((name, value) for name, value in _distinct(values.items()))
        raise InputError(
            f"{out / 'runs'} mixes {what}: {one!r} has {first[:40]!r}, {two!r} has {second[:40]!r}; {mend}"
        )


def _distinct(items: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first two items whose values differ."""
    kept: dict[str, str] = {}
    for name, value in items:
        kept.setdefault(value, name)
    return [(name, value) for value, name in kept.items()][:2]


def _by_cost(runs: Sequence[Run]) -> tuple[Run, ...]:
    timed = all(run.latency for run in runs)

    def cost(run: Run) -> tuple[float, float, str]:
        return (run.latency.median if timed and run.latency else 0.0, run.nfe, run.name)

    return tuple(sorted(runs, key=cost))


def _metric_names(runs: Sequence[Run]) -> tuple[str, ...]:
    def rank(metric: str) -> tuple[float, str]:
        family = metric_family(metric)
        return (METRIC_ORDER.index(family) if family in METRIC_ORDER else math.inf, metric)

    return tuple(sorted({metric for run in runs for metric in run.metrics}, key=rank))


def _label(value: Any) -> str:
    """A configuration's pipeline or plan in one string, whether it is given by name or in full."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("name", "spec", "path") if value.get(key)), None)
    return "" if value is None else str(value)
