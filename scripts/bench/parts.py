"""Fréchet distance of solvers with each part of a plan, one at a time, against the same solver without it.

``python -m fewstep.scripts.bench.parts --pipe demo:fashion-dit --work DIR --solvers solvers.json \
--time_shift time_shift.json --n 2560 --out parts.json``

Both rows of a comparison are made with the same seeds, from 0 on. What a part is fitted or chosen on has others:
scales are chosen on `SCREEN_SEED`, ratios and statistics come from the teacher's samples of `FIT_SEED`, cells of the
time-shift part from their own search.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.eval.assets import load_pipeline, reference_plan
from fewstep.eval.conditions import conditions_for
from fewstep.samplers import Plan, denoisers
from fewstep.samplers.analytic_init import estimate_start_statistics
from fewstep.samplers.build_knowledge import build_knowledge_base
from fewstep.samplers.files import read_json, write_json
from fewstep.samplers.recording import clean_samples
from fewstep.samplers.redi import ReDi
from fewstep.search.aligner import fit_aligner

from .guidance_window import windowed
from .judge import Judge, best, compared, fd, fd_difference
from .solvers import SCREEN_SEED, SIGMAS
from .time_shift import base_plan, shifted

BASES = ("dpmpp-2m", "ddim", "unipc")
BUDGETS = (10, 5)
FIT_SEED = 3_000_000
FIT_BATCH = 16
SCALES = (1.002, 1.005, 1.01, 1.02, 1.03, 1.05, 1.08)
FIRST = 800
"Timestep of the early start."

WINDOW = (0.0, 0.6)
"Fractions of the steps that are guided in the row of the guidance part."

KNOWN = [999, 899, 799, 199, 99]
KEY_STEP = 3
"Grid and retrieval of the row of the redi part."


@dataclass(frozen=True)
class Bench:
    """What all rows of a run share.

    Attributes:
        judge: of the rows that are reported.
        screen: of the choice of scales.
        files: folder of plans with files beside them.
        cells: window and cutoff of the time-shift part, by solver.
        samples: teacher's samples for ratios and statistics.
        iterations: of the aligner, for each ratio.
        trajectories: in the knowledge base.
    """

    judge: Judge
    screen: Judge
    files: Path
    cells: dict[str, dict[str, Any]]
    samples: int
    iterations: int
    trajectories: int

    @cached_property
    def pipe(self) -> Any:
        """The pipeline, without a plan."""
        return load_pipeline(self.judge.pipe)

    @property
    def guided(self) -> bool:
        """Whether the demo is sampled with guidance."""
        return reference_plan(self.judge.pipe, 50).guidance is not None

    def inputs(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Arguments of the call for some samples to fit on, but their noise."""
        return conditions_for(self.pipe).inputs([FIT_SEED + number for number in numbers])

    def calls(self, count: int) -> Iterator[dict[str, Any]]:
        """Arguments of the calls for samples to fit on."""
        for start in range(0, count, 64):
            numbers = range(start, min(start + 64, count))
            generators = [torch.Generator().manual_seed(FIT_SEED + number) for number in numbers]
            yield self.inputs(numbers) | {"generator": generators, "output_type": "np"}

    @cached_property
    def clean(self) -> Tensor:
        """The teacher's samples (samples, ...), as the network sees them."""
        return torch.cat(list(clean_samples(self.pipe, reference_plan(self.judge.pipe, 50), self.calls(self.samples))))


@dataclass(frozen=True)
class Case:
    """A solver at a budget: what a part is added to.

    Attributes:
        bench: what all rows share.
        solver: its name in `fewstep.scripts.bench.solvers.SOLVERS`.
        budget: evaluations, two of the network where it is guided.
        spacing: of its steps.
        plan: as JSON.
    """

    bench: Bench
    solver: str
    budget: int
    spacing: str
    plan: dict[str, Any]

    def file(self, part: str) -> Path:
        """Where the plan with a part is kept that has files beside it, or took long to make."""
        return self.bench.files / f"{self.solver}-{self.budget}-{part}.json"

    def parsed(self, **changed: Any) -> Plan:
        """The plan with some fields changed."""
        return Plan.from_json({"fewstep_plan": 1} | self.plan | changed)

    def on(self, **grid: Any) -> dict[str, Any]:
        """The plan on another grid."""
        solver = self.plan["solver"]
        config = {key: value for key, value in solver["config"].items() if key not in SIGMAS.values()}
        return self.plan | {"solver": solver | {"config": config}, "grid": grid}


def time_shift(case: Case) -> dict[str, Any] | None:
    """The cell that was best on the U-Net, of DPM-Solver++ where the solver was not searched; none without a search."""
    cells = case.bench.cells
    cell = cells.get(case.solver, cells.get("dpmpp-2m"))
    return cell and shifted(case.plan, **cell)


def epsilon_scaling(case: Case) -> dict[str, Any]:
    """The scale that is best on the screening seeds."""
    return scaled(case, case.plan)


def scaled(case: Case, plan: dict[str, Any]) -> dict[str, Any]:
    """A plan with the scale that is best on the screening seeds."""
    plans = [plan | {"correction": {"type": "epsilon-scaling", "scale": scale}} for scale in SCALES]
    return best((plan, case.bench.screen.row(plan)) for plan in plans)[0]


def aligner(case: Case) -> Path:
    """Ratios fitted in sequence, on samples of the teacher."""
    path, bench = case.file("aligner"), case.bench
    if not path.is_file():
        fitted = fit_aligner(
            bench.pipe,
            case.parsed(),
            samples=bench.clean,
            iterations=bench.iterations,
            batch=FIT_BATCH,
            lr=4e-3,
            seed=FIT_SEED,
            call=bench.inputs,
        )
        fitted.save(path)
    return path


def early_start(case: Case) -> dict[str, Any]:
    """The same spacing from `FIRST` on."""
    return case.on(type="rule", rule=case.spacing, steps=case.budget, options={"first": FIRST})


def early_scaled(case: Case) -> dict[str, Any]:
    """The early start with epsilon scaling."""
    return scaled(case, early_start(case))


def analytic_init(case: Case) -> Path:
    """The early start, from the Gaussian of the teacher's samples."""
    path, bench = case.file("analytic-init"), case.bench
    statistics = bench.files / "start.safetensors"
    if not statistics.is_file():
        network = next(iter(denoisers(bench.pipe).values()))
        estimate_start_statistics(bench.clean, network).save(statistics)
    start = {"type": "analytic-init", "file": statistics.name}
    Plan.from_json({"fewstep_plan": 1} | early_start(case) | {"start": start}).save(path)
    return path


def zero_snr(case: Case) -> dict[str, Any]:
    """Trailing steps on betas rescaled to zero terminal SNR."""
    return case.on(type="rule", rule="trailing-zero-snr", steps=case.budget)


def guidance(case: Case) -> dict[str, Any] | None:
    """Guidance in `WINDOW` only, where the demo is guided."""
    return windowed(case.plan, WINDOW) if case.bench.guided else None


def redi(case: Case) -> Path | None:
    """Five evaluations with a retrieval among them, for one solver on the demo with classes."""
    bench = case.bench
    if (case.solver, case.budget, bench.guided) != ("dpmpp-2m", len(KNOWN), True):
        return None
    path = case.file("redi")
    part = ReDi(key_step=KEY_STEP, condition="class_labels")
    plan = case.parsed(**case.on(type="explicit", timesteps=KNOWN)).model_copy(update={"start": part})
    base = bench.files / part.file
    if not base.is_file():
        build_knowledge_base(bench.pipe, plan, bench.calls(bench.trajectories)).save(base)
    plan.save(path)
    return path


PARTS: dict[str, Callable[[Case], dict[str, Any] | Path | None]] = {
    "early-start": early_start,
    "analytic-init": analytic_init,
    "early-start, epsilon-scaling": early_scaled,
    "time-shift": time_shift,
    "epsilon-scaling": epsilon_scaling,
    "zero-snr": zero_snr,
    "guidance": guidance,
    "aligner": aligner,
    "redi": redi,
}
BESIDE = {"analytic-init": "early-start", "early-start, epsilon-scaling": "early-start"}
"Parts that contain another one, with which they are compared too."


def rows_of(case: Case, parts: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The row of the plain solver and of each part, compared with it."""
    judge = case.bench.judge
    made = {"plain": judge.row(case.plan)}
    yield "plain", compared(made["plain"])
    for part in parts:
        plan = PARTS[part](case)
        if plan is None:
            continue
        made[part] = judge.row(plan)
        row = compared(made[part], made["plain"])
        other = made.get(BESIDE.get(part, ""))
        yield part, row | ({"beside": fd_difference(made[part], other)} if other else {})


def main() -> None:
    """Writes ``--out`` after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipe", default="demo:fashion-dit")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--solvers", type=Path, required=True, help="result of fewstep.scripts.bench.solvers")
    parser.add_argument("--time_shift", type=Path, help="result of fewstep.scripts.bench.time_shift; none: no such row")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=2560)
    parser.add_argument("--screen_n", type=int, default=256)
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS), choices=BUDGETS)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--samples", type=int, default=256, help="of the teacher, to fit on")
    parser.add_argument("--iterations", type=int, default=30, help="of the aligner, for each ratio")
    parser.add_argument("--trajectories", type=int, default=2000, help="in the knowledge base")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {key: getattr(options, key) for key in ("samples", "iterations", "trajectories")}
    searched = read_json(options.time_shift)["solvers"] if options.time_shift else {}
    bench = Bench(
        judge=Judge(options.pipe, options.work, options.n, 0),
        screen=Judge(options.pipe, options.work, options.screen_n, SCREEN_SEED),
        files=options.work / "plans",
        cells={name: found["best"] for name, found in searched.items()},
        **settings,
    )
    cases: list[dict[str, Any]] = []
    result = {key: getattr(options, key) for key in ("pipe", "n", "screen_n")} | settings | {"cases": cases}
    for base in options.bases:
        for budget in options.budgets:
            spacing, plan = base_plan(base, budget, bench.screen, options.solvers)
            rows: dict[str, Any] = {}
            cases.append({"solver": base, "budget": budget, "spacing": spacing, "rows": rows})
            for part, row in rows_of(Case(bench, base, budget, spacing, plan), options.parts):
                rows[part] = row
                print(base, budget, part, f"{fd(row):.2f}", row.get("difference"), flush=True)  # noqa: T201
                write_json(options.out, result)


if __name__ == "__main__":
    main()
