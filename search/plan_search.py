"""The search for a plan: candidates on common noise, the best again on fresh noise, and the proof on a third."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ..eval.features import metric_name
from ..eval.metrics import KINDS
from ..samplers import Evidence, InputError, Plan, TunedFor, denoisers, fingerprint
from .axes.steps import prepared, timesteps_of
from .budget import Judges
from .cache import Call
from .claims import CONSTRAINTS, FAILED, finished_trials
from .finalists import leaders, loss_of, winner
from .found import Candidate, Found
from .measure import CandidateError, Measured, Measurer
from .objective import QUALITIES, Objective
from .optuna_samplers import OPTUNA_SAMPLERS
from .rounds import ROWS, Round, read, scored, violations, written
from .space import Parameters, Space, plan_key
from .study import KeepOn, Outcome, StudySetting, run_study
from .study_storage import study_url

FRESH = 1 << 20
"Number of the first sample that finalists are compared on."

PROOF = 1 << 21
"Number of the first sample that the evidence of the plan found is measured on."

MEASURED, SPENT, SECONDS = "measured", "spent", "seconds"
"User attributes of a trial: what it measured last, network rows, and time."

LOWEST_LOG_SNR = -20.0
"Shown for a time that has no signal at all."

Progress = Callable[[int, int, str], None]
"Told the finished trials, how many there will be, and the best so far in words."


@dataclass(frozen=True, kw_only=True)
class SearchSetting:
    """How a search is run.

    Attributes:
        storage: a folder or an SQLAlchemy URL, shared by all workers.
        name: of the study in the storage.
        trials: distinct plans to measure.
        seed: of the sampler.
        sampler: a name of `OPTUNA_SAMPLERS`; None takes ``tpe`` for one objective and ``nsga2`` for two.
        confirm: how many of the best are measured again on fresh noise.
        fresh_n: samples for that, and for the evidence of the plan found.
        batch_size: samples in a call.
        first_seed: of sample 0, for the evidence.
        key: what else must be equal to go on with the study, JSON-able.
    """

    storage: str
    name: str = "plan"
    trials: int = 64
    seed: int = 0
    sampler: str | None = None
    confirm: int = 5
    fresh_n: int = 2048
    batch_size: int = 64
    first_seed: int = 0
    key: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("trials", "confirm", "fresh_n", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of a search is at least 1; got {getattr(self, name)}")

    def seeds(self, first: int, n: int) -> tuple[int, int]:
        """The first seed of n samples, and one past the last."""
        return self.first_seed + first, self.first_seed + first + n


def search(
    pipe: Any,
    space: Space,
    objective: Objective,
    call: Call,
    setting: SearchSetting,
    *,
    judges: Judges | None = None,
    teacher: Plan | None = None,
    also: tuple[str, ...] = (),
    starts: Sequence[Plan | Parameters] = (),
    baselines: Mapping[str, Plan] | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> Found:
    """The best plan of a space, as far as some trials find it.

    All candidates are measured on the same samples. The best of them are then measured on fresh ones, so that the
    plan found is not the luckiest of many, and the evidence of the plan found comes from a third set, on which nothing
    was chosen. A search that was stopped goes on where it was, with any number of workers on the same storage.

    Args:
        pipe: the pipeline, with no plan attached; as it was afterwards.
        space: what varies.
        objective: what is searched for.
        call: from numbers of samples to the arguments of a call for them, seeds included.
        setting: how.
        judges: what images are judged with.
        teacher: the plan that paired qualities and limits compare with.
        also: qualities to measure besides, by name; on fresh samples alone where those of the search are too few.
        starts: plans, or parameters, to measure before any other; plans that the space cannot say are left out.
        baselines: plans to compare with on fresh noise, by name; the best of them there is what the evidence names.
        progress: told after each trial.
        command: that started the search, for its evidence and report.

    Raises:
        InputError: for input that cannot work, a storage that holds another search, or when no candidate kept to the
            limits.
    """
    began = time.monotonic()
    job = _Job(pipe, space, objective, call, setting, judges or Judges(), teacher, also)
    job.measurer(FRESH).check_enough(max(setting.fresh_n, objective.rungs[-1]))
    study = job.run([start for start in map(job.start, starts) if start is not None], progress)
    trials = finished_trials(study)
    history = tuple(job.candidate(trial, index) for index, trial in enumerate(trials))
    fresh = job.round(study, FRESH)
    front = tuple(job.again(fresh, candidate) for candidate in leaders(history, objective, setting.confirm))
    best = winner(front, objective)
    plain = [Candidate(-1 - i, plan, {}, name=name) for i, (name, plan) in enumerate((baselines or {}).items())]
    others = tuple(job.again(fresh, candidate) for candidate in plain)
    proof = job.round(study, PROOF)
    rival = min(others, key=lambda other: loss_of(other, objective), default=None)
    plan = job.proven(proof, best.plan, rival, command)
    spent = sum(int(trial.user_attrs.get(SPENT, 0)) for trial in trials)
    seconds = sum(float(trial.user_attrs.get(SECONDS, 0.0)) for trial in trials)
    settings = job.study_setting.identity | {
        "steps": plan.nominal_steps,
        "trials": len(trials),
        "seeds": setting.seeds(0, objective.rungs[-1]),
        "fresh_seeds": setting.seeds(FRESH, setting.fresh_n),
    }
    return Found(
        plan=plan,
        metric=job.metric(objective.quality, setting.fresh_n),
        higher_is_better=QUALITIES[objective.quality] == ">=",
        cost=objective.cost,
        front=tuple(replace(each, gap=fresh.gap(each.plan, best.plan, objective.quality)) for each in front),
        history=history,
        baselines=tuple(replace(each, gap=fresh.gap(each.plan, best.plan, objective.quality)) for each in others),
        spent=spent + study.user_attrs.get(ROWS, 0),
        seconds=max(seconds, time.monotonic() - began),
        settings=settings,
        command=command,
    )


@dataclass(frozen=True)
class _Job:
    """One worker's search."""

    pipe: Any
    space: Space
    objective: Objective
    call: Call
    setting: SearchSetting
    judges: Judges
    teacher: Plan | None
    also: tuple[str, ...]

    @property
    def study_setting(self) -> StudySetting:
        """The study of this search."""
        objective, setting = self.objective, self.setting
        network = next(iter(denoisers(self.pipe).values()))
        key = {
            "pipeline": type(self.pipe).__name__,
            "weights": fingerprint(network),
            "base": plan_key(self.space.base),
            "space": [axis.name for axis in self.space.axes],
            "objective": objective.quality if objective.cost is None else f"{objective.quality}, {objective.cost}",
            "limits": [str(limit) for limit in objective.limits],
            "rungs": list(objective.rungs),
            "first_seed": setting.first_seed,
            "sampler": self.sampler_name,
        }
        return StudySetting(
            storage=study_url(setting.storage),
            name=setting.name,
            key=key | dict(setting.key),
            trials=setting.trials,
            seed=setting.seed,
            directions=("minimize",) if objective.cost is None else ("minimize", "minimize"),
            constraints=bool(objective.limits),
        )

    @property
    def sampler_name(self) -> str:
        """The sampler that was asked for, or the one that suits the number of objectives."""
        return self.setting.sampler or ("tpe" if self.objective.cost is None else "nsga2")

    def run(self, starts: Sequence[Parameters], progress: Progress | None) -> Study:
        """Runs trials until there are enough."""
        measurer = self.measurer(0)
        make = OPTUNA_SAMPLERS[self.sampler_name]

        def sampler(seed: int) -> BaseSampler:
            return make(seed, self.space.base, _violations_of if self.objective.limits else None)

        def tell(study: Study) -> None:
            assert progress is not None
            progress(len(finished_trials(study)), self.setting.trials, self.best_so_far(study))

        def evaluate(plan: Plan, keep_on: KeepOn) -> Outcome:
            return self.evaluate(measurer, plan, keep_on)

        return run_study(self.study_setting, self.space, evaluate, sampler, starts, tell if progress else None)

    def measurer(self, first: int) -> Measurer:
        """Measures on the samples from a number on."""
        objective = self.objective if first == 0 else replace(self.objective, rungs=(self.setting.fresh_n,))
        size = self.setting.batch_size
        return Measurer(
            self.pipe,
            objective,
            self.call,
            self.judges,
            teacher=self.teacher,
            also=self.also,
            batch_size=size,
            first=first,
        )

    def evaluate(self, measurer: Measurer, plan: Plan, keep_on: KeepOn) -> Outcome:
        """Measures a candidate rung by rung."""
        spent, began = measurer.spent, time.monotonic()
        measured: Measured | None = None
        failed = None
        broken: tuple[float, ...] = ()
        try:
            for n in self.objective.rungs:
                measured = measurer.measure(plan, n)
                if n < self.objective.rungs[-1] and not keep_on(n, self.objective.loss(measured)):
                    break
            if measured is not None:
                broken = violations(self.objective, measured, measurer)
        except CandidateError as error:
            failed = error.reason
        notes: dict[str, Any] = {SPENT: measurer.spent - spent, SECONDS: time.monotonic() - began}
        if failed is not None or measured is None:
            return Outcome((), notes=notes, failed=failed)
        values: tuple[float, ...] = (self.objective.loss(measured),)
        if self.objective.cost is not None:
            values += (measured.costs[self.objective.cost],)
        return Outcome(values, broken, notes | {MEASURED: written(measured)})

    def start(self, start: Plan | Parameters) -> Parameters | None:
        """The parameters of a start; None for a plan that the space cannot say."""
        if not isinstance(start, Plan):
            return start
        try:
            return self.space.params(start)
        except InputError:
            return None

    def candidate(self, trial: FrozenTrial, index: int) -> Candidate:
        """A finished trial."""
        plan = self.space.plan(trial.params)
        failed = trial.user_attrs.get(FAILED)
        if failed is not None:
            return Candidate(index, plan, dict(trial.params), "failed", reason=str(failed))
        measured = read(trial.user_attrs[MEASURED], plan)
        complete = trial.state == TrialState.COMPLETE
        found = Candidate(
            index,
            plan,
            dict(trial.params),
            "complete" if complete else "pruned",
            at_search=scored(measured, self.objective.quality),
            holds=all(violation <= 0 for violation in _violations_of(trial)),
            reason=None if complete else f"stopped at {measured.n} samples",
        )
        return self.placed(found)

    def placed(self, candidate: Candidate) -> Candidate:
        """A candidate with the times at which it evaluates the network, where its grid says them."""
        try:
            times = timesteps_of("grid", self.pipe, candidate.plan)
            process = prepared(self.pipe, candidate.plan).process
        except InputError:
            return candidate
        levels = (float(process.log_snr(t)) for t in times)
        return replace(candidate, timesteps=times, log_snrs=tuple(max(level, LOWEST_LOG_SNR) for level in levels))

    def round(self, study: Study, first: int) -> Round:
        """The samples from a number on."""
        return Round(study, self.objective, self.measurer(first), first, self.setting.fresh_n)

    def again(self, fresh: Round, candidate: Candidate) -> Candidate:
        """A candidate with its measurement on fresh samples."""
        measured = fresh.measure(candidate.plan)
        return replace(
            self.placed(candidate), fresh=scored(measured, self.objective.quality), holds=fresh.holds(measured)
        )

    def metric(self, kind: str, n: int) -> str:
        """The name of a quality, with that of its feature network."""
        net = self.judges.net
        return metric_name(net.name, n, net.dim, kind) if net and kind in KINDS and KINDS[kind].suffixed else kind

    def proven(self, proof: Round, plan: Plan, rival: Candidate | None, command: str) -> Plan:
        """The plan with what it was tuned for, and evidence."""
        measured, n = proof.measure(plan), proof.n
        seeds = self.setting.seeds(proof.first, n)
        evidence = [
            Evidence(metric=self.metric(kind, n), value=value.value, se=value.se, n=n, seeds=seeds, command=command)
            for kind, value in measured.values.items()
        ]
        for kind in measured.values if rival else ():
            assert rival is not None
            gap = proof.gap(plan, rival.plan, kind)
            if gap is not None:
                shown = {"n": n, "seeds": seeds, "against": rival.name, "command": command}
                name = f"{self.metric(kind, n)} difference"
                evidence.append(Evidence(metric=name, value=gap.value, se=gap.se, **shown))
        tuned_for = TunedFor(
            fingerprint=fingerprint(next(iter(denoisers(self.pipe).values()))),
            pipeline=type(self.pipe).__name__,
            steps=plan.nominal_steps,
        )
        return plan.model_copy(update={"tuned_for": tuned_for, "evidence": tuple(evidence)})

    def best_so_far(self, study: Study) -> str:
        """The best complete trial in words."""
        found = [trial for trial in finished_trials(study) if trial.state == TrialState.COMPLETE]
        if not found:
            return "nothing yet"
        best = min(found, key=lambda trial: (any(v > 0 for v in _violations_of(trial)), trial.values[0]))
        value = read(best.user_attrs[MEASURED], self.space.base).values[self.objective.quality]
        return f"{self.objective.quality} {value.value:.4g} ± {value.se:.2g}"


def _violations_of(trial: FrozenTrial) -> tuple[float, ...]:
    return tuple(trial.system_attrs.get(CONSTRAINTS, ()))
