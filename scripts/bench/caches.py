"""Caches of this package and of others on a demo: distance to the uncached run, operations, bytes and time.

``python -m fewstep.scripts.bench.caches --pipe demo:fashion-dit --work DIR --n 1280 --out caches-dit.json``

All rows are DDIM in 20 trailing steps, or in fewer for the control, with the same seeds. Operations and bytes are those
of one call, the decoder left out. With ``--repeats`` speed is measured, each case called in turn with the
uncached run; a busy machine shows in the quartiles. What settings are made from has seeds from `FIT_SEED` on.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.eval.environment import environment
from fewstep.eval.generate import ImageSet, call_pipeline, generate
from fewstep.eval.record import sampling_config
from fewstep.eval.score import Scorer, Scores
from fewstep.samplers import Plan, attach
from fewstep.samplers.feature_changes import measure_changes
from fewstep.samplers.files import read_json, write_json
from fewstep.search.ladders import LADDERS

from .cache_cases import STEPS, Calibration, Case, dit_cases, rungs, unet_cases
from .cache_cost import Trial, counted, timed
from .judge import Judge
from .parts import FIT_SEED
from .peers import magnitude_ratios
from .solvers import guidance_of

CASES: dict[str, Callable[[Calibration], list[Case]]] = {
    "demo:fashion-unet": unet_cases,
    "demo:fashion-dit": dit_cases,
}
FIT_COUNT = 16
TOGETHER = 5
"Cases that share an uncached call when they are timed."

SHARES = (0.65, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2)
"Of the work, in the settings that are taken from the ladder of a calibration."

PAIRED = ("psnr", "feature_distance")


@dataclass(frozen=True)
class CacheJudge(Judge):
    """Makes, scores and costs the images of cases, each against the uncached run of the same seeds.

    Attributes:
        count: images of the call whose operations and bytes are counted.
    """

    count: int = 32

    @cached_property
    def guidance(self) -> dict[str, Any] | None:
        """What the demo is guided by."""
        return guidance_of(self.pipe)

    @cached_property
    def uncached(self) -> Case:
        """The run that all others are compared with."""
        return Case("control", "uncached", str(STEPS))

    @cached_property
    def _scorer(self) -> Scorer:
        scorer = super()._scorer
        distance = () if scorer.unmet("fd") else (scorer.name("fd"),)
        return dataclasses.replace(scorer, wanted=(*distance, *PAIRED))

    @cached_property
    def _reference(self) -> Scores:
        return self._scorer.score(self._images(self.uncached), None)

    @cached_property
    def known(self) -> Calibration:
        """What settings are made from, measured once."""
        path = self.out / "calibration.json"
        if not path.is_file():
            seeds = range(FIT_SEED, FIT_SEED + FIT_COUNT)
            plan = self._trial(self.uncached).plan
            found: dict[str, Any] = {"changes": measure_changes(self._pipe, plan, self._arguments(seeds)), "ratios": ()}
            kinds = ("block-mask", "step-rehash") if "transformer" in self._pipe.components else ("unet-deep",)
            ladders = (LADDERS[kind](self._pipe, plan, STEPS, self._samples) for kind in kinds)
            found["rungs"] = [rung for ladder in ladders for rung in rungs(ladder, SHARES)]
            if "transformer" in self._pipe.components:
                with attach(self._pipe, plan):
                    found["ratios"] = magnitude_ratios(self._pipe, self._call(seeds), STEPS)
            write_json(path, found)
        return Calibration(**read_json(path))

    def _arguments(self, seeds: range) -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return {**self._conditions.inputs(seeds), "generator": generators, "output_type": "np"}

    def _samples(self, plan: Plan) -> Tensor:
        """What the calibration looks at."""
        with attach(self._pipe, plan):
            made = self._pipe(**self._arguments(range(FIT_SEED, FIT_SEED + FIT_COUNT))).images
        return torch.from_numpy(made)

    def case_row(self, case: Case) -> dict[str, Any]:
        """Scores, operations and bytes of a case; ``difference`` is of Fréchet distances, and its error."""
        path = self._path("rows", case, self.n)
        if not path.is_file():
            scores = self._scorer.score(self._images(case), None if case == self.uncached else self._reference)
            name = self._scorer.name("fd")
            metrics = {kind: scores.metrics.get(name if kind == "fd" else kind) for kind in ("fd", *PAIRED)}
            row: dict[str, Any] = {"nfe": scores.nfe}
            row["metrics"] = {
                kind: {"value": metric.value, "se": metric.se} for kind, metric in metrics.items() if metric
            }
            if name in scores.differences:
                row["difference"] = [scores.differences[name].difference, scores.differences[name].se]
            write_json(path, row)
        return dict(read_json(path))

    def cost(self, case: Case) -> dict[str, float]:
        """``flops``: how many times fewer operations than uncached; ``bytes``: held, for each image."""
        path = self._path("costs", case, self.count)
        if not path.is_file():
            operations, held = counted(self._pipe, self._trial(case), self._call(range(self.count)))
            write_json(path, {"operations": operations, "held": held})
        found = read_json(path)
        of_all = found["operations"] if case == self.uncached else read_json(self._uncached_cost())["operations"]
        return {"flops": of_all / found["operations"], "bytes": found["held"] / self.count}

    def times(self, cases: Sequence[Case], batch: int, repeats: int) -> None:
        """Times the cases that are not timed yet, some together."""
        todo = [case for case in cases if not self._path("times", case, batch).is_file()]
        for start in range(0, len(todo), TOGETHER):
            named = {str(index): case for index, case in enumerate(todo[start : start + TOGETHER])}
            trials = {name: self._trial(case) for name, case in named.items()}
            speeds = timed(self._pipe, self._trial(self.uncached), trials, self._call(range(batch)), repeats)
            for name, speed in speeds.items():
                write_json(self._path("times", named[name], batch), speed)

    def speed(self, case: Case, batch: int) -> dict[str, Any] | None:
        """How many times faster than uncached, None where it was not timed."""
        path = self._path("times", case, batch)
        return dict(read_json(path)) if path.is_file() else None

    def has(self, case: Case) -> bool:
        """Whether a case was scored before."""
        return self._path("rows", case, self.n).is_file()

    def _trial(self, case: Case) -> Trial:
        return Trial(Plan.from_json({"fewstep_plan": 1} | case.plan(self.guidance)), case.peer)

    def _call(self, seeds: range) -> Callable[[], Any]:
        return lambda: call_pipeline(self._pipe, self._conditions, seeds, {})

    def _uncached_cost(self) -> Path:
        self.cost(self.uncached)
        return self._path("costs", self.uncached, self.count)

    def _images(self, case: Case) -> ImageSet:
        trial = self._trial(case)
        peer = {"peer": list(case.peer)} if case.peer else {}
        config = sampling_config(self._pipe, self.pipe, trial.plan, self._conditions, peer, self.seed, self._components)
        seeds = range(self.seed, self.seed + self.n)
        images = ImageSet(self.out / "shards" / config.hash, config.hash, self._conditions, seeds)
        if images.missing():
            with trial.installed(self._pipe):
                generate(self._pipe, trial.plan, images, call_kwargs={}, batch_size=self.batch_size)
        return images

    def _path(self, folder: str, case: Case, count: int) -> Path:
        said = json.dumps(dataclasses.asdict(case), sort_keys=True)
        path = self.out / folder / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}-{count}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def said(case: Case, guidance: dict[str, Any] | None) -> dict[str, Any]:
    """What a row is of; lists that were measured are said once, beside the rows."""
    found: dict[str, Any] = {"whose": case.whose, "method": case.method, "setting": case.setting}
    if case.peer is None:
        return found | {"plan": case.plan(guidance)}
    package, settings = case.peer
    return found | {"package": package, "settings": {k: v for k, v in settings.items() if k != "mag_ratios"}}


def main() -> None:
    """Writes ``--out`` after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipe", default="demo:fashion-dit", choices=list(CASES))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=1280)
    parser.add_argument("--count", type=int, default=32, help="images of the call whose operations are counted")
    parser.add_argument("--methods", nargs="*", default=[""], help="first letters of the methods to run; all")
    parser.add_argument("--repeats", type=int, default=0, help="calls behind each speed; 0 for none")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="images of a call that is timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    judge = CacheJudge(options.pipe, options.work, options.n, 0, count=options.count)
    result: dict[str, Any] = {"pipe": options.pipe, "n": options.n, "seed": judge.seed, "repeats": options.repeats}
    result["machine"] = machine()
    result["known"] = dataclasses.asdict(judge.known)
    cases = [judge.uncached, *CASES[options.pipe](judge.known)]
    chosen = [case for case in cases if case.method.startswith(tuple(options.methods))]
    for batch in options.batches if options.repeats else ():
        judge.times(chosen, batch, options.repeats)
    rows: list[dict[str, Any]] = []
    for case in cases:
        if case in chosen or judge.has(case):
            times = {str(batch): speed for batch in options.batches if (speed := judge.speed(case, batch))}
            rows.append(said(case, judge.guidance) | judge.case_row(case) | judge.cost(case) | {"times": times})
            report(rows[-1])
            write_json(options.out, result | {"rows": rows})


def report(row: dict[str, Any]) -> None:
    """Prints a row."""
    distance = row["metrics"].get("feature_distance", {"value": 0.0})["value"]
    print(f"{row['method']} {row['setting']}: distance {distance:.3f}, operations {row['flops']:.2f}x", flush=True)  # noqa: T201


def machine() -> dict[str, Any]:
    """What the speeds were measured on, and with which packages."""
    found = environment("cpu")
    packages = {name: found["packages"][name] for name in ("torch", "diffusers")}
    packages |= {name: metadata.version(name) for name in ("DeepCache", "cache-dit")}
    return {"cpu": found["cpu"], "cores": found["cpu_cores"], "threads": found["torch_threads"], "packages": packages}


if __name__ == "__main__":
    main()
