"""The bench of token models: rows answer, are timed, scored and recorded; it can be stopped anywhere and resumed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from ...samplers.errors import InputError
from ..assets import shipped_plans
from ..baselines import check_names
from ..bench import make_folder, process_state, time_of_day
from ..environment import environment
from ..options import IMAGES_ONLY, LEAST_SAMPLES, BenchOptions
from ..progress import Meter, meter
from ..record import Decoding, Paired, RunRecord, SamplingConfig, digest, drop_old_controls, is_final, refuse_strangers
from ..report import write_report
from ..report_csv import write_csv
from ..timing_files import load_measured, save_timing, timing_conditions
from .answers import Answer, answers, causal_answers
from .kept import AnswerFile, AnswerSet
from .models import TokenModels, load_token_models
from .rows import (
    TokenRow,
    control_tokens,
    most_tokens,
    read_recipes,
    static_row,
    token_rows,
)
from .scores import Marks
from .tasks import Question, QuestionSource, question_source
from .timing import ANSWER_TIMING, AnswerTiming, latency_calls, measure_answers

SEED_RULE = "question number = seed mod count, its items and the decoding's streams from the seed"
SCORES = 1
"Of the way answers are scored; records of another one are made again."


def run_token_bench(options: BenchOptions, *, command: str = "", console: Console | None = None) -> Path:
    """Runs or continues a bench of token models; arguments and files as of `fewstep.eval.run.run_bench`.

    Raises:
        InputError: for anything the user can mend, in one line.
    """
    options.refuse(IMAGES_ONLY, "token models")
    state = process_state(options.device)
    if state.num_processes > 1:
        raise InputError("token models answer in one process; run fewstep bench without accelerate launch")
    started = time_of_day()
    with meter(console or Console(stderr=True), True) as progress:
        progress.doing("loading")
        bench = open_token_bench(options, options.device or str(state.device), command, started)
        rows = bench.answer(bench.rows, progress)
        rows = bench.with_controls(rows, progress)
        bench.time(rows, progress)
        bench.record(rows, progress)
    write_csv(options.out)
    write_report(options.out)
    return options.out


def open_token_bench(options: BenchOptions, device: str, command: str, started: str) -> TokenBench:
    """Loads the models and the recipes, and checks everything that can be checked before work begins."""
    questions = question_source(options.pipe, options.questions)
    questions.check_supply(options.answers, least=LEAST_SAMPLES)
    given = read_recipes(shipped_plans(options.pipe), options.plans)
    models = load_token_models(options.pipe, dtype=options.dtype, device=device)
    found = token_rows(models, given, questions([options.seed])[0], options.gen_length)
    check_names(found.rows)
    bench = TokenBench(
        options=options,
        models=models,
        questions=questions,
        rows=found.rows,
        left_out=found.left_out,
        command=command,
        started=started,
    )
    names = {row.name for row in found.rows}
    refuse_strangers(options.out, bench.config(found.rows[0]).model_hash, bench.seeds, names)
    make_folder(options.out)
    return bench


@dataclass(frozen=True)
class TokenBench:
    """A bench that was checked and can run. Made by `open_token_bench`.

    Attributes:
        options: what the user asked for.
        models: that answer.
        questions: that they are asked.
        rows: the reference first; without controls.
        left_out: why presets are not among the rows.
        command: for the records.
        started: time of day, ISO 8601.
    """

    options: BenchOptions
    models: TokenModels
    questions: QuestionSource
    rows: Sequence[TokenRow]
    left_out: tuple[str, ...]
    command: str
    started: str

    @property
    def seeds(self) -> tuple[int, int]:
        """First seed of all rows, and one past the last."""
        return (self.options.seed, self.options.seed + self.options.answers)

    @cached_property
    def device(self) -> torch.device:
        """Where all networks are."""
        return next(self._network(self.rows[0]).parameters()).device

    @cached_property
    def components(self) -> dict[str, str]:
        """Fingerprints of the networks and of the tokenizer."""
        text = self.models.tokenizer.backend_tokenizer.to_str()
        return self.models.prints | {"tokenizer": hashlib.sha256(text.encode()).hexdigest()}

    def config(self, row: TokenRow) -> SamplingConfig:
        """The configuration that names the answers of a row."""
        return SamplingConfig(
            pipe=self.options.pipe,
            pipe_class="TokenModels",
            components=self.components,
            plan=row.plan,
            call_kwargs={"gen_length": self.options.gen_length},
            conditions=self.questions.about,
            dtype=self.options.dtype,
            device=self.device.type,
            first_seed=self.options.seed,
            versions={name: ".".join(version(name).split(".")[:2]) for name in ("torch", "transformers")},
            seed_rule=SEED_RULE,
        )

    def _network(self, row: TokenRow) -> torch.nn.Module:
        return self.models.modules[row.network]

    def _ask(self, row: TokenRow, questions: Sequence[Question]) -> list[Answer]:
        """What a row answers, in one batch."""
        gen_length, size = self.options.gen_length, len(questions)
        if row.recipe is None:
            return causal_answers(self.models, questions, gen_length, batch_size=size)
        return answers(self.models, questions, row.recipe, gen_length, denoiser=row.network, batch_size=size)

    # --- answers

    @cached_property
    def _asked(self) -> list[Question]:
        return self.questions(range(*self.seeds))

    def answer_set(self, row: TokenRow) -> AnswerSet:
        """The answers of a row, made or not."""
        return AnswerSet(self.options.out, self.config(row).hash, self._asked)

    def answer(self, rows: Sequence[TokenRow], progress: Meter) -> list[TokenRow]:
        """Makes all answers of some rows that are missing; returns the rows."""
        for row in rows:
            progress.expect(self._steps(row) * self.answer_set(row).missing())
        for row in rows:
            progress.doing(f"answering {row.name}")
            self._complete(row, progress)
        return list(rows)

    def _complete(self, row: TokenRow, progress: Meter) -> AnswerFile:
        return self.answer_set(row).complete(
            self.models,
            partial(self._ask, row),
            self.options.batch_size,
            lambda count: progress.advance(self._steps(row) * count),
        )

    def with_controls(self, rows: Sequence[TokenRow], progress: Meter) -> list[TokenRow]:
        """Adds for each plan the static row of its network with as many evaluations, and makes its answers."""
        known = {self.config(row).hash: row for row in rows}
        complete: list[TokenRow] = []
        controls: list[TokenRow] = []
        for row in rows:
            if row.role == "plan":
                control = self._control(row, progress)
                config_hash = self.config(control).hash
                if config_hash not in known:
                    known[config_hash] = control
                    controls.append(control)
                name = known[config_hash].name
                row = dataclasses.replace(row, control=name if name != row.name else None)
            complete.append(row)
        check_names([*complete, *controls])
        return [*complete, *self.answer(controls, progress)]

    def _control(self, row: TokenRow, progress: Meter) -> TokenRow:
        def static(tokens: int) -> TokenRow:
            return static_row(self.models, row.network, tokens, "control")

        def nfe(tokens: int) -> float:
            (made,) = self.answer([static(tokens)], progress)
            return self._nfe(made)

        return static(control_tokens(self._nfe(row), nfe, most_tokens(self.models, row.network)))

    def _nfe(self, row: TokenRow) -> float:
        return fmean(answer.nfe for answer in self.answer_set(row).read().answers)

    # --- timing

    @cached_property
    def _timed(self) -> list[Question]:
        """Questions of the timings, the same whatever n is."""
        seed, options = self.options.seed, self.options
        tasks = self.questions(range(seed, seed + 64))
        return self.questions(range(seed, seed + max(options.batch_size, latency_calls(tasks, options.timing_repeats))))

    @cached_property
    def _timing_conditions(self) -> dict[str, Any]:
        return timing_conditions(str(self.device), self.options.batch_size, self.options.timing_repeats)

    def time(self, rows: Sequence[TokenRow], progress: Meter) -> None:
        """Times the rows that no file has a timing of."""
        missing = [row for row in rows if self._read_timing(row) is None]
        for row in missing:
            progress.expect(self._timing_work(row))
        for row in missing:
            progress.doing(f"timing {row.name}")
            timing = measure_answers(
                partial(self._ask, row),
                self._timed,
                batch_size=self.options.batch_size,
                calls=latency_calls(self._timed, self.options.timing_repeats),
                networks=[self._network(row)],
                device=self.device,
            )
            save_timing(self._timing_path(row), self._timing_conditions, timing)
            progress.advance(self._timing_work(row))

    def _timing_path(self, row: TokenRow) -> Path:
        return self.options.out / "timing" / f"{self.config(row).hash}.json"

    def _read_timing(self, row: TokenRow) -> AnswerTiming | None:
        return load_measured(self._timing_path(row), self._timing_conditions, ANSWER_TIMING)

    def _timing_work(self, row: TokenRow) -> float:
        return self._steps(row) * self.options.batch_size

    def _steps(self, row: TokenRow) -> float:
        """Evaluations of a row for the progress bar."""
        tokens = getattr(row.recipe.unmask, "tokens", None) if row.recipe else None
        return self.options.gen_length / (tokens or 4)

    # --- records

    def record(self, rows: Sequence[TokenRow], progress: Meter) -> None:
        """Writes one record for each row that has no final one yet."""
        progress.doing("scoring")
        drop_old_controls(self.options.out, self.seeds, {row.name for row in rows})
        env = environment(str(self.device))
        reference = self._marks(rows[0])
        for row in rows:
            request = self._request(row, rows[0])
            if not is_final(self.options.out, row.name, request):
                self._run_record(row, rows[0], request, reference, env).save(self.options.out)

    def _marks(self, row: TokenRow) -> Marks:
        return Marks.of(self.answer_set(row).read().answers)

    def _request(self, row: TokenRow, reference: TokenRow) -> str:
        """Hash of all that the record of a row depends on."""
        wanted = {
            "config": self.config(row).hash,
            "pipe": self.options.pipe,
            "plan": row.name,
            "role": row.role,
            "control": row.control,
            "reference": [reference.name, self.config(reference).hash],
            "seeds": self.seeds,
            "scores": SCORES,
            "left_out": self.left_out if row.role == "reference" else (),
            "timing": self._timing_conditions,
        }
        return digest(wanted)

    def _run_record(
        self, row: TokenRow, reference: TokenRow, request: str, marks: Marks, env: dict[str, Any]
    ) -> RunRecord:
        config, found, timing = self.config(row), self.answer_set(row).read(), self._read_timing(row)
        if timing is None:
            raise InputError(f"{self._timing_path(row)} vanished; run the same command again")
        mine = Marks.of(found.answers)
        return RunRecord(
            name=row.name,
            role=row.role,
            config=config.to_json(),
            config_hash=config.hash,
            model_hash=config.model_hash,
            request=request,
            nfe=fmean(answer.nfe for answer in found.answers),
            n=self.options.answers,
            seeds=self.seeds,
            metrics=mine.metrics,
            paired=Paired(reference.name, mine.minus(marks)) if row.role != "reference" else None,
            floor={},
            timing=timing.timing,
            worst=(),
            control=row.control,
            env=env,
            command=self.command,
            started=self.started,
            finished=time_of_day(),
            warnings=(*timing.timing.warnings, *(self.left_out if row.role == "reference" else ())),
            decoding=self._decoding(row, found, timing),
        )

    def _decoding(self, row: TokenRow, found: AnswerFile, timing: AnswerTiming) -> Decoding:
        return Decoding(
            network=row.network,
            exact=found.exact,
            gen_length=self.options.gen_length,
            token_forwards=fmean(answer.token_forwards for answer in found.answers),
            tokens_per_forward=fmean(answer.new_tokens / answer.nfe for answer in found.answers),
            tokens_per_s=timing.tokens_per_s,
            batch_size=self.options.batch_size,
            device=self._timing_conditions["device"],
            torch_threads=self._timing_conditions["torch_threads"],
            kv_bytes=timing.kv_bytes,
            failed=sum(answer.failed for answer in found.answers),
        )
