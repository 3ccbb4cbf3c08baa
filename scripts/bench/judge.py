"""Rows of the quality benchmarks: the images of a plan on fixed seeds, scored against real ones; resumable."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from fewstep.eval.assets import load_pipeline
from fewstep.eval.conditions import conditions_for
from fewstep.eval.generate import ImageSet, generate
from fewstep.eval.jackknife import Jackknife, paired_difference
from fewstep.eval.options import BenchOptions
from fewstep.eval.record import component_prints, sampling_config
from fewstep.eval.score import Scorer
from fewstep.samplers import Plan
from fewstep.samplers.files import read_json, write_json

Name = TypeVar("Name")

KINDS = ("fd", "class_accuracy", "precision", "recall")
NOT_SAID = ("fewstep_plan", "name", "tuned_for", "evidence")
"Of a plan, in its row."


@dataclass(frozen=True)
class Judge:
    """Makes and scores images of plans, all on the same seeds.

    Attributes:
        pipe: a demo such as ``demo:fashion-dit``.
        out: folder of the shards and rows; the same folder goes on where it stopped.
        n: images per row.
        seed: of the first image.
        batch_size: images per call.
        stats: file of the real images' statistics; None for those that the demo is scored with.
    """

    pipe: str
    out: Path
    n: int
    seed: int
    batch_size: int = 64
    stats: Path | None = None

    @cached_property
    def _pipe(self) -> Any:
        return load_pipeline(self.pipe)

    @cached_property
    def _components(self) -> dict[str, Any]:
        return component_prints(self._pipe)

    @cached_property
    def _conditions(self) -> Any:
        return conditions_for(self._pipe)

    @cached_property
    def _scorer(self) -> Scorer:
        options = BenchOptions(
            pipe=self.pipe, out=self.out, n=self.n, seed=self.seed, device="cpu", reference_stats=self.stats
        )
        scorer = Scorer.from_options(options, self._conditions, "cpu")
        kinds = [kind for kind in KINDS if scorer.unmet(kind) is None]
        return dataclasses.replace(scorer, wanted=tuple(scorer.name(kind) for kind in kinds))

    def row(self, plan: dict[str, Any] | Path | Plan) -> dict[str, Any]:
        """The scores of a plan: ``nfe``, and for each metric its value and error; replicates of the distance.

        Args:
            plan: the plan, its file, or its JSON without version and name.
        """
        parsed = _parsed(plan)
        config = sampling_config(self._pipe, self.pipe, parsed, self._conditions, {}, self.seed, self._components)
        against = f"-{self.stats.stem}" if self.stats else ""
        path = self.out / "rows" / f"{config.hash}-{self.n}{against}.json"
        if path.is_file():
            return dict(read_json(path))
        seeds = range(self.seed, self.seed + self.n)
        images = ImageSet(self.out / "shards" / config.hash, config.hash, self._conditions, seeds)
        generate(self._pipe, parsed, images, call_kwargs={}, batch_size=self.batch_size)
        scores = self._scorer.score(images, None)
        metrics = {
            kind: {"value": metric.value, "se": metric.se}
            for kind in KINDS
            if (metric := scores.metrics.get(self._scorer.name(kind)))
        }
        fd = scores.jackknives[self._scorer.name("fd")]
        said = {key: value for key, value in parsed.to_json().items() if key not in NOT_SAID}
        row = {"plan": said, "n": self.n, "seed": self.seed, "nfe": scores.nfe, "metrics": metrics}
        row["fd_jackknife"] = {name: getattr(fd, name) for name in ("plain", "replicates", "sizes")}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, row)
        return row


def _parsed(plan: dict[str, Any] | Path | Plan) -> Plan:
    if isinstance(plan, Plan):
        return plan
    return Plan.load(plan) if isinstance(plan, Path) else Plan.from_json({"fewstep_plan": 1} | plan)


def fd(row: dict[str, Any]) -> float:
    """The Fréchet distance of a row, NaN where the images were none (overflow)."""
    return float(row["metrics"]["fd"]["value"])


def fd_difference(row: dict[str, Any], base: dict[str, Any]) -> tuple[float, float]:
    """Fréchet distance of ``row`` less that of ``base`` on the same seeds, and its standard error."""
    pair = paired_difference(_jackknife(row), _jackknife(base))
    return pair.value, pair.se


def compared(row: dict[str, Any], base: dict[str, Any] | None = None) -> dict[str, Any]:
    """A row for a file of results: without replicates, with the difference of distances to ``base`` and its error."""
    kept = {key: value for key, value in row.items() if key != "fd_jackknife"}
    return kept if base is None else kept | {"difference": fd_difference(row, base)}


def _jackknife(row: dict[str, Any]) -> Jackknife:
    metric, rest = row["metrics"]["fd"], row["fd_jackknife"]
    return Jackknife(
        metric["value"], metric["se"], row["n"], rest["plain"], tuple(rest["replicates"]), tuple(rest["sizes"])
    )


def best(rows: Iterable[tuple[Name, dict[str, Any]]]) -> tuple[Name, dict[str, Any]]:
    """The named row of the least Fréchet distance."""
    return min(rows, key=lambda pair: fd(pair[1]))
