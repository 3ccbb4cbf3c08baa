"""The record of a run: what was sampled, what it scored, what it cost. One JSON file per row."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from ..samplers import Plan, fingerprint
from ..samplers.errors import InputError
from ..samplers.files import read_json, write_json
from .assets import component_modules
from .conditions import Conditions
from .timing import Timing

Role = Literal["reference", "baseline", "plan", "control"]

RUN_FORMAT = 1
SEED_RULE = "one CPU torch.Generator per image, seeded with the image's seed; condition number = seed mod count"


def digest(value: Any, length: int = 16) -> str:
    """First hexadecimal digits of the sha256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@dataclass(frozen=True)
class SamplingConfig:
    """Everything that can move a sample, and nothing that must not (n, batch size, number of processes).

    Attributes:
        pipe: the pipeline as the user named it; not part of the hash, because the weights are.
        pipe_class: class name of the pipeline.
        components: fingerprint of each network, and the configuration of the pipeline's own scheduler.
        plan: the plan as JSON; its name and evidence are not part of the hash.
        call_kwargs: arguments of the pipeline's call besides conditions, generator and output type.
        conditions: what the images show.
        dtype: of weights and computation.
        device: ``cpu`` or ``cuda``: the kind, never the number.
        first_seed: seed of the first image; the others count up from it.
        versions: see `sample_versions`.
        seed_rule: how seeds become noise and conditions.
    """

    pipe: str
    pipe_class: str
    components: Mapping[str, Any]
    plan: Mapping[str, Any]
    call_kwargs: Mapping[str, Any]
    conditions: Mapping[str, Any]
    dtype: str
    device: str
    first_seed: int
    versions: Mapping[str, str] = field(default_factory=lambda: sample_versions())
    seed_rule: str = SEED_RULE

    def to_json(self) -> dict[str, Any]:
        """The whole configuration."""
        return dataclasses.asdict(self)

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that name the shards of these samples."""
        value = self.to_json()
        del value["pipe"]
        value["plan"] = {k: v for k, v in self.plan.items() if k not in ("name", "evidence", "tuned_for")}
        return digest(value)

    @property
    def model_hash(self) -> str:
        """As `hash`, of what all rows of one bench share: all but the plan."""
        value = self.to_json()
        del value["pipe"], value["plan"]
        return digest(value)


def sample_versions() -> dict[str, str]:
    """Major and minor versions of the packages that can move a sample."""
    return {name: ".".join(version(name).split(".")[:2]) for name in ("torch", "diffusers")}


def sampling_config(
    pipe: Any,
    spec: str,
    plan: Plan,
    conditions: Conditions,
    call_kwargs: Mapping[str, Any],
    first_seed: int,
    components: Mapping[str, Any] | None = None,
) -> SamplingConfig:
    """The configuration of a pipeline that no plan is attached to.

    Args:
        pipe: the pipeline, on its device.
        spec: how the user named it.
        plan: what will be attached.
        conditions: what the images show.
        call_kwargs: further arguments of the call.
        first_seed: seed of the first image.
        components: what `component_prints` gave for this pipeline, to save doing it again.
    """
    module = next(iter(component_modules(pipe).values()))
    files = plan.file_digests()
    return SamplingConfig(
        pipe=spec,
        pipe_class=type(pipe).__name__,
        components=component_prints(pipe) if components is None else components,
        plan=plan.to_json() | ({"files": files} if files else {}),
        call_kwargs=dict(call_kwargs),
        conditions=conditions.to_json(),
        dtype=str(next(module.parameters()).dtype).removeprefix("torch."),
        device=pipe.device.type,
        first_seed=first_seed,
    )


def component_prints(pipe: Any) -> dict[str, Any]:
    """Fingerprint of each network of a pipeline, and the configuration of its scheduler."""
    prints: dict[str, Any] = {name: fingerprint(module) for name, module in component_modules(pipe).items()}
    config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return prints | {
        "scheduler": {"class": type(pipe.scheduler).__name__, **json.loads(json.dumps(config, default=str))}
    }


@dataclass(frozen=True)
class Metric:
    """One score.

    Attributes:
        value: the score.
        se: its standard error, None where none is defined.
        n: number of generated images behind it.
        higher_is_better: direction.
        net_fingerprint: of the feature network, None for pixel metrics.
        reference: what it is measured against, None for a metric of the images alone.
    """

    value: float
    se: float | None
    n: int
    higher_is_better: bool
    net_fingerprint: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Difference:
    """A metric of a row minus that of the reference row, on the same seeds."""

    difference: float
    se: float | None


@dataclass(frozen=True)
class Paired:
    """Differences to the row called ``against``."""

    against: str
    metrics: Mapping[str, Difference]


@dataclass(frozen=True)
class Floor:
    """What real images score against real images."""

    value: float
    n: int


@dataclass(frozen=True)
class Worst:
    """An image far from the reference's image of the same seed."""

    seed: int
    feature_distance: float


@dataclass(frozen=True)
class Decoding:
    """What answers of token models cost besides time and network evaluations.

    Attributes:
        network: folder of the network that answered.
        exact: whether all answers are those of the same recipe without a cache.
        gen_length: masks after each prompt, or the most tokens of an autoregressive answer.
        token_forwards: mean of the positions evaluated for an answer.
        tokens_per_forward: new tokens per forward pass that the answer took part in, on average over answers.
        tokens_per_s: new tokens per second of the call that measured the throughput.
        batch_size: of that call.
        device: where it ran.
        torch_threads: on the host.
        kv_bytes: most bytes of keys and values that were kept at once for one answer.
        failed: answers that a constraint or a scorer gave up; they count as wrong.
    """

    network: str
    exact: bool
    gen_length: int
    token_forwards: float
    tokens_per_forward: float
    tokens_per_s: float
    batch_size: int
    device: str
    torch_threads: int
    kv_bytes: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One row of a bench. The fields are those of the JSON file.

    Attributes:
        seeds: first seed, and one past the last.
        request: hash of everything the numbers depend on; a file with the same one is final.
        control: name of the row that spends as long with the reference's solver in fewer steps, for a plan.
        env: what `fewstep.eval.environment.environment` gave.
        command: the command line that a person can run again.
        decoding: further costs, for answers of token models.
    """

    name: str
    role: Role
    config: Mapping[str, Any]
    config_hash: str
    model_hash: str
    request: str
    nfe: float
    n: int
    seeds: tuple[int, int]
    metrics: Mapping[str, Metric]
    paired: Paired | None
    floor: Mapping[str, Floor]
    timing: Timing
    worst: tuple[Worst, ...]
    control: str | None
    env: Mapping[str, Any]
    command: str
    started: str
    finished: str
    warnings: tuple[str, ...]
    decoding: Decoding | None = None
    format: int = RUN_FORMAT

    def save(self, out: Path) -> None:
        """Writes OUT/runs/<name>.json, complete or not at all."""
        write_json(run_path(out, self.name), dataclasses.asdict(self))


def run_path(out: Path, name: str) -> Path:
    """The file of the row called ``name``."""
    return out / "runs" / f"{name}.json"


def check_name(name: str) -> None:
    """Raises ``InputError`` when a row's name cannot be that of a file everywhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InputError(f"a row is called {name!r}; use letters, digits, '.', '_' and '-' in the plan's name")


def is_final(out: Path, name: str, request: str) -> bool:
    """Whether OUT holds the row called ``name`` with the same request, so that nothing is left to measure.

    Raises:
        InputError: when its file is damaged.
    """
    path = run_path(out, name)
    return path.is_file() and read_run(path)["request"] == request


def read_run(path: Path) -> dict[str, Any]:
    """The JSON of one row.

    Raises:
        InputError: when the file is damaged or of another format.
    """
    value = read_json(path)
    needed = {"name", "role", "config_hash", "model_hash", "request", "n", "seeds"}
    if not isinstance(value, dict) or value.get("format") != RUN_FORMAT or not needed <= value.keys():
        raise InputError(f"{path} is not a run of this version of fewstep; delete it, or choose another --out")
    return value


def refuse_strangers(out: Path, model_hash: str, seeds: tuple[int, int], names: set[str]) -> None:
    """Raises when OUT holds runs that cannot share a table with the ones to come.

    Args:
        out: the folder of the bench.
        model_hash: `SamplingConfig.model_hash` of the rows to come.
        seeds: their seeds.
        names: their names; runs of these names will be made again when they differ in n.

    Raises:
        InputError: for runs of another pipeline or configuration, or other rows on other seeds; controls come and go
            with the plans (`drop_old_controls`).
    """
    for path in sorted((out / "runs").glob("*.json")):
        run = read_run(path)
        if run["model_hash"] != model_hash:
            pipe = run.get("config", {}).get("pipe", "another pipeline")
            raise InputError(
                f"--out {out} holds runs of other weights or settings ({pipe}, row {run['name']}); "
                "give another --out, or delete that folder"
            )
        if run["role"] != "control" and run["name"] not in names and tuple(run["seeds"]) != seeds:
            first, end = run["seeds"]
            raise InputError(
                f"--out {out} holds row {run['name']} on seeds {first} to {end - 1}, "
                f"not {seeds[0]} to {seeds[1] - 1}; give --n {end - first} --seed {first}, or another --out"
            )


def drop_old_controls(out: Path, seeds: tuple[int, int], names: set[str]) -> None:
    """Removes the records of controls on other seeds: with another n a plan can have another control.

    Args:
        out: the folder of the bench.
        seeds: of its rows.
        names: of its rows; their records will be made again.
    """
    for path in (out / "runs").glob("*.json"):
        run = read_run(path)
        if run["role"] == "control" and run["name"] not in names and tuple(run["seeds"]) != seeds:
            path.unlink()
