"""A whole bench: rows are timed, sampled, scored and recorded; it can be stopped anywhere and resumed.

With several processes all of them sample, and the first one alone times (while the others wait, so that
nothing disturbs it) and scores.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from ..samplers import Plan, PlanWarning, attach
from ..samplers.errors import InputError
from .assets import load_pipeline, plan_file, reference_plan, shipped_plans
from .baselines import Row, baseline_rows, check_names, control_row, control_steps, plan_rows, reference_row
from .conditions import Conditions, conditions_for
from .environment import environment
from .generate import ImageSet, generate
from .options import ANSWERS_ONLY, BenchOptions, pipeline_arguments
from .progress import Meter, meter
from .record import (
    RunRecord,
    SamplingConfig,
    component_prints,
    digest,
    drop_old_controls,
    is_final,
    refuse_strangers,
    sampling_config,
)
from .report import write_report
from .report_csv import write_csv
from .score import Scorer, Scores
from .timing import WARMUPS, Timing, measure
from .timing_files import load_timing, save_timing, timing_conditions

_BATCH_CALLS = 4
_SINGLE_CALLS = WARMUPS + 6
_SINGLE_COST = 8
"For the progress bar: calls of a timing besides the repeats, and a lone image's cost in images of a batch."


def run_bench(options: BenchOptions, *, command: str = "", console: Console | None = None) -> Path:
    """Runs or continues a bench of images; arguments and files as of `fewstep.eval.run.run_bench`.

    Raises:
        InputError: for anything the user can mend, in one line.
    """
    state = process_state(options.device)
    started = time_of_day()
    with warnings.catch_warnings(), meter(console or Console(stderr=True), state.is_main_process) as progress:
        warnings.simplefilter("ignore", PlanWarning)  # the records keep them
        progress.doing("loading")
        bench = open_bench(options, state, command, started)
        rows = bench.with_controls(bench.rows, progress)
        bench.sample(rows, progress)
        if state.is_main_process:
            bench.record(rows, progress)
    if state.is_main_process:
        write_csv(options.out)
        write_report(options.out)
    return options.out


def process_state(device: str | None) -> PartialState:
    """This process among those that ``accelerate launch`` started; one of one otherwise."""
    return PartialState(cpu=True) if device == "cpu" else PartialState()


def open_bench(options: BenchOptions, state: PartialState, command: str, started: str) -> Bench:
    """Loads the pipeline and the plans, and checks everything that can be checked before work begins."""
    options.refuse(ANSWERS_ONLY, "a pipeline of images")
    shipped = [(path.stem, Plan.load(path)) for path in shipped_plans(options.pipe)]
    plans = [(name, plan) for name, plan in shipped if plan.nominal_steps in options.steps]
    plans += [(path.stem, Plan.load(plan_file(path))) for path in options.plans]
    own = reference_plan(options.pipe, options.reference_steps)
    reference = Plan.load(plan_file(options.reference)) if options.reference else own
    device = options.device if options.device and state.num_processes == 1 else str(state.device)
    pipe = load_pipeline(options.pipe, dtype=options.dtype, device=device, download=options.download)
    rows = (reference_row(reference), *baseline_rows(pipe, reference, options.steps), *plan_rows(plans))
    check_names(rows)
    bench = Bench(
        options=options,
        state=state,
        pipe=pipe,
        conditions=conditions_for(pipe, class_labels=options.class_labels, prompts=options.prompts),
        call_kwargs=pipeline_arguments(pipe, options.call_kwargs),
        rows=rows,
        command=command,
        started=started,
    )
    for row in rows:
        attach(pipe, row.plan).detach()
    names = {row.name for row in rows}
    refuse_strangers(options.out, bench.config(rows[0]).model_hash, bench.seeds, names)
    make_folder(options.out)
    if state.is_main_process:
        bench.scorer.kinds()
    return bench


def make_folder(out: Path) -> None:
    """Makes the folder of the results, or raises ``InputError`` when that cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be a folder ({error.strerror}); give another one") from None


@dataclass(frozen=True)
class Bench:
    """A bench that was checked and can run. Made by `open_bench`.

    Attributes:
        options: what the user asked for.
        state: this process among all.
        pipe: the loaded pipeline, with no plan attached.
        conditions: what the images show.
        call_kwargs: further arguments of the pipeline's call.
        rows: the reference first; without controls.
        command: for the records.
        started: time of day, ISO 8601.
    """

    options: BenchOptions
    state: PartialState
    pipe: Any
    conditions: Conditions
    call_kwargs: dict[str, Any]
    rows: Sequence[Row]
    command: str
    started: str

    @property
    def seeds(self) -> tuple[int, int]:
        """First seed of all rows, and one past the last."""
        return (self.options.seed, self.options.seed + self.options.images)

    @cached_property
    def components(self) -> dict[str, Any]:
        """Fingerprints of the pipeline's networks."""
        return component_prints(self.pipe)

    @cached_property
    def scorer(self) -> Scorer:
        """What judges the images."""
        return Scorer.from_options(self.options, self.conditions, str(self.pipe.device))

    @cached_property
    def _timing_conditions(self) -> dict[str, Any]:
        return timing_conditions(str(self.pipe.device), self.options.batch_size, self.options.timing_repeats)

    def config(self, row: Row) -> SamplingConfig:
        """The configuration that names the images of a row."""
        return sampling_config(
            self.pipe,
            self.options.pipe,
            row.plan,
            self.conditions,
            self.call_kwargs,
            self.options.seed,
            self.components,
        )

    def images(self, row: Row) -> ImageSet:
        """The images of a row, made or not."""
        config_hash = self.config(row).hash
        return ImageSet(self.options.out / "shards" / config_hash, config_hash, self.conditions, range(*self.seeds))

    # --- timing

    def with_controls(self, rows: Sequence[Row], progress: Meter) -> list[Row]:
        """Times the rows, and adds for each plan the reference's solver in as many steps as take as long."""
        timings = self._timings(rows, progress)
        known = {self.config(row).hash: row for row in rows}
        reference, steps = rows[0], rows[0].plan.nominal_steps
        complete: list[Row] = []
        controls: list[Row] = []
        for row in rows:
            if row.role == "plan" and steps is not None:
                control = control_row(reference.plan, control_steps(timings[row.name], timings[reference.name], steps))
                config_hash = self.config(control).hash
                if config_hash not in known:
                    known[config_hash] = control
                    controls.append(control)
                row = dataclasses.replace(row, control=known[config_hash].name)
            complete.append(row)
        check_names([*complete, *controls])
        self._timings(controls, progress)
        return [*complete, *controls]

    def _timings(self, rows: Sequence[Row], progress: Meter) -> dict[str, Timing]:
        """Timings of some rows: measured in the main process where no file has them, read in the others."""
        if self.state.is_main_process:
            missing = [row for row in rows if self._read_timing(row) is None]
            for row in missing:
                progress.expect(self._timing_work(row))
            for row in missing:
                progress.doing(f"timing {row.name}")
                self._measure(row)
                progress.advance(self._timing_work(row))
        self.state.wait_for_everyone()
        return {row.name: self._timing(row) for row in rows}

    def _measure(self, row: Row) -> None:
        with attach(self.pipe, row.plan):
            timing = measure(
                self.pipe,
                self.conditions,
                self.call_kwargs,
                first_seed=self.options.seed,
                batch_size=self.options.batch_size,
                repeats=self.options.timing_repeats,
            )
        save_timing(self._timing_path(row), self._timing_conditions, timing)

    def _timing_path(self, row: Row) -> Path:
        return self.options.out / "timing" / f"{self.config(row).hash}.json"

    def _read_timing(self, row: Row) -> Timing | None:
        return load_timing(self._timing_path(row), self._timing_conditions)

    def _timing(self, row: Row) -> Timing:
        timing = self._read_timing(row)
        if timing is None:
            raise InputError(f"{self._timing_path(row)} vanished; run the same command again")
        return timing

    # --- images

    def sample(self, rows: Sequence[Row], progress: Meter) -> None:
        """Makes this process's share of all images that are missing, and waits for the others."""
        world = self.state.num_processes

        def advance(row: Row) -> Callable[[int], None]:
            return lambda count: progress.advance(_steps(row) * count * world)

        for row in rows:
            progress.expect(_steps(row) * self.images(row).missing())
            progress.expect(self.options.images)
        for row in rows:
            progress.doing(f"sampling {row.name}")
            generate(
                self.pipe,
                row.plan,
                self.images(row),
                call_kwargs=self.call_kwargs,
                batch_size=self.options.batch_size,
                rank=self.state.process_index,
                world=world,
                progress=advance(row),
            )
        self.state.wait_for_everyone()

    # --- scores

    def record(self, rows: Sequence[Row], progress: Meter) -> None:
        """Scores what has no final record yet, and writes one record for each row."""
        drop_old_controls(self.options.out, self.seeds, {row.name for row in rows})
        env = environment(str(self.pipe.device))
        reference: Scores | None = None
        for row in rows:
            progress.doing(f"scoring {row.name}")
            request = self._request(row, rows[0])
            if not is_final(self.options.out, row.name, request):
                if reference is None:
                    reference = self.scorer.score(self.images(rows[0]), None)
                scores = reference if row is rows[0] else self.scorer.score(self.images(row), reference)
                self._run_record(row, rows[0].name, request, scores, env).save(self.options.out)
            progress.advance(self.options.images)

    def _request(self, row: Row, reference: Row) -> str:
        """Hash of all that the record of a row depends on."""
        wanted = {
            "config": self.config(row).hash,
            "pipe": self.options.pipe,
            "plan": row.plan.name,
            "role": row.role,
            "control": row.control,
            "reference": [reference.name, self.config(reference).hash],
            "seeds": self.seeds,
            "scorer": self.scorer.key,
            "timing": self._timing_conditions,
        }
        return digest(wanted)

    def _run_record(self, row: Row, reference: str, request: str, scores: Scores, env: dict[str, Any]) -> RunRecord:
        config, timing = self.config(row), self._timing(row)
        return RunRecord(
            name=row.name,
            role=row.role,
            config=config.to_json(),
            config_hash=config.hash,
            model_hash=config.model_hash,
            request=request,
            nfe=scores.nfe,
            n=self.options.images,
            seeds=self.seeds,
            metrics=scores.metrics,
            paired=scores.paired(reference) if row.role != "reference" else None,
            floor=scores.floor if row.role == "reference" else {},
            timing=timing,
            worst=scores.worst,
            control=row.control,
            env=env,
            command=self.command,
            started=self.started,
            finished=time_of_day(),
            warnings=tuple(dict.fromkeys((*scores.warnings, *timing.warnings))),
        )

    def _timing_work(self, row: Row) -> float:
        single = _SINGLE_COST * (self.options.timing_repeats + _SINGLE_CALLS)
        return _steps(row) * (_BATCH_CALLS * self.options.batch_size + single)


def _steps(row: Row) -> int:
    """Steps of a row for the progress bar."""
    return row.plan.nominal_steps or 50


def time_of_day() -> str:
    """Now, to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
