"""A study: trials of one search, shared by any number of workers, that can be killed and resumed at any moment."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FixedTrial, TrialState

from ..samplers import InputError, Plan
from .claims import FAILED, Claim, Claims, finished_trials
from .proposals import MakeSampler, Proposal, Proposer
from .space import Parameters, Space
from .study_storage import open_storage, open_study

__all__ = ["Evaluate", "KeepOn", "Outcome", "Progress", "SearchWarning", "StudySetting", "finished_trials", "run_study"]

USED_UP = "used_up"
"User attribute of a study: the number of finished trials after which nothing new was found in its space."

BROKEN = 1e30
"Violation of a broken candidate, so that a sampler with constraints ranks it last."

POLL_S = 0.2
"Seconds between two looks at what other workers do, for a worker that has nothing left to begin."

Progress = Callable[[optuna.Study], None]
"Told after each trial that this worker finished."


class SearchWarning(UserWarning):
    """A search that went on, but not as it was asked for."""


@dataclass(frozen=True)
class StudySetting:
    """What a study is.

    Attributes:
        storage: an SQLAlchemy URL, see `study_storage.study_url`. Workers on several machines need PostgreSQL.
        name: of the study in its storage.
        key: what must be equal to go on with it, JSON-able; seed, directions and reduction are compared too.
        trials: finished trials that are asked for; a study can be gone on with to more.
        seed: of the samplers.
        directions: ``minimize`` or ``maximize``, one for each value of an outcome.
        constraints: whether outcomes have violations.
        reduction: of those that reach a rung, the share 1/reduction goes on.
        heartbeat_s: seconds between two signs of life of a running trial.
        grace_s: seconds without one after which a worker on another machine counts as dead, and its trial is made
            free. Dead workers of the same machine are seen at once.
    """

    storage: str
    name: str
    key: Mapping[str, Any]
    trials: int
    seed: int
    directions: tuple[str, ...] = ("minimize",)
    constraints: bool = False
    reduction: int = 3
    heartbeat_s: int = 5
    grace_s: int = 20

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise InputError(f"a study has at least 1 trial; got {self.trials}")
        if self.seed < 0:
            raise InputError(f"a study's seed is at least 0; got {self.seed}")
        if not self.directions or set(self.directions) - {"minimize", "maximize"}:
            raise InputError(f"the directions of a study are minimize or maximize; got {self.directions}")
        if self.reduction < 2:
            raise InputError(f"a study's reduction is at least 2; got {self.reduction}")
        if not 0 < self.heartbeat_s < self.grace_s:
            raise InputError(
                f"heartbeats come more often than the grace of a dead worker ends; got every {self.heartbeat_s} s "
                f"for {self.grace_s} s"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """All that must be equal to go on with the study, as JSON gives it back."""
        own = {"seed": self.seed, "directions": self.directions, "reduction": self.reduction}
        found: dict[str, Any] = json.loads(json.dumps({**own, **self.key}))
        return found


@dataclass(frozen=True)
class Outcome:
    """What a measurement found.

    Attributes:
        values: one for each direction.
        violations: of the constraints, at most 0 where they hold.
        notes: more to keep, JSON-able, as user attributes of the trial.
        failed: why the candidate is broken, for one without values. Values or violations that are not finite are
            another reason. A broken candidate counts as a finished trial that was pruned, and is not tried again.
    """

    values: tuple[float, ...]
    violations: tuple[float, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    failed: str | None = None

    @property
    def reason(self) -> str | None:
        """Why the candidate is broken; None for a sound one."""
        if self.failed is None and not all(math.isfinite(value) for value in (*self.values, *self.violations)):
            return f"not finite: values {self.values}, violations {self.violations}"
        return self.failed


KeepOn = Callable[[int, float], bool]
"Told the number of samples and the value on them, whether to go on with more."


class Evaluate(Protocol):
    """Measures a plan."""

    def __call__(self, plan: Plan, keep_on: KeepOn) -> Outcome:
        """Measures a plan, and asks at each rung but the last whether to keep on.

        The values of a plan that was told to stop are not used; its trial has the value that was reported last.
        """


def run_study(
    setting: StudySetting,
    space: Space,
    evaluate: Evaluate,
    sampler: MakeSampler,
    starts: Sequence[Parameters] = (),
    progress: Progress | None = None,
) -> optuna.Study:
    """Runs trials until the study has as many finished ones as were asked for, or its space is used up.

    Any number of workers may run the same study at the same time; no plan is measured twice. With one worker the
    finished trials depend on the setting, the space and the starts alone, however often the worker was killed and
    resumed on its machine. (On another machine, wait until the dead worker's grace is over.)

    Each rung keeps the best 1/reduction of what was reported there so far, asynchronously (arXiv:1810.05934,
    Algorithm 2); the first `reduction` are kept. A study with several objectives stops nothing early.

    Args:
        setting: what the study is.
        space: all plans.
        evaluate: measures one. What it raises ends this worker; the trial does not count, and is tried again.
        sampler: makes a sampler from a seed; a new one for each trial. It may depend on the finished trials, which it
            sees numbered without gaps, and on its seed, nothing else.
        starts: parameters that are measured before any that the sampler suggests, in this order.
        progress: told after each finished trial.

    Returns:
        The study. Its `finished_trials` are those that count.

    Raises:
        InputError: when the storage cannot be used, holds another study of this name, or a start is not in the space.
    """
    for index, start in enumerate(starts):
        _check_start(space, index, start)
    storage = open_storage(setting.storage, setting.heartbeat_s, setting.grace_s)
    study = open_study(storage, setting.name, setting.directions, setting.identity)
    worker = _Worker(
        setting,
        Claims(storage, study, setting.trials),
        Proposer(space, sampler, setting.seed, setting.directions, starts),
        evaluate,
    )
    while worker.step():
        if progress is not None:
            progress(study)
    return study


@dataclass
class _Worker:
    setting: StudySetting
    claims: Claims
    proposer: Proposer
    evaluate: Evaluate

    def step(self) -> bool:
        """Finishes a trial; False when there is none left to finish."""
        while True:
            standing = self.claims.standing()
            if len(standing.finished) >= self.setting.trials:
                return False
            if len(standing.finished) + len(standing.running) < self.setting.trials:
                proposal = self.proposer.propose(standing.finished, standing.running, standing.plans)
                if proposal is not None:
                    if self._run(proposal):
                        return True
                    continue
                if not standing.running:
                    self._used_up(len(standing.finished))
                    return False
            time.sleep(POLL_S)

    def _run(self, proposal: Proposal) -> bool:
        """Measures a plan; False when another worker has it, or took this one for dead."""
        with self.claims.claim(proposal) as claim:
            try:
                if claim.holds:
                    self._measure(claim, proposal.plan)
                    return True
                claim.tell(TrialState.FAIL, notes={FAILED: "another worker measures this plan, or the last one"})
            except UpdateFinishedTrialError:
                warnings.warn(
                    f"trial {claim.number} gave no sign of life for {self.setting.grace_s} s and was taken for dead; "
                    "its plan is measured again",
                    SearchWarning,
                    stacklevel=4,
                )
            except BaseException as error:
                claim.tell(TrialState.FAIL, notes={FAILED: repr(error)})
                raise
        return False

    def _measure(self, claim: Claim, plan: Plan) -> None:
        reported: list[float] = []
        kept = True

        def keep_on(n: int, value: float) -> bool:
            nonlocal kept
            if len(self.setting.directions) == 1:
                claim.report(n, value)
                reported.append(value)
                kept = kept and self._is_kept(value, claim.reports(n))
            return kept

        outcome = self.evaluate(plan, keep_on)
        if outcome.reason is not None:
            violations = (BROKEN,) if self.setting.constraints else ()
            claim.tell(TrialState.PRUNED, None, {**outcome.notes, FAILED: outcome.reason}, violations)
        elif kept:
            claim.tell(TrialState.COMPLETE, outcome.values, outcome.notes, outcome.violations)
        else:
            last = [value for value in reported[-1:] if not math.isnan(value)]
            claim.tell(TrialState.PRUNED, last or None, outcome.notes, outcome.violations)

    def _is_kept(self, value: float, others: Sequence[float]) -> bool:
        """Whether a value is among the best 1/reduction of all at its rung, itself included; NaN is not."""
        if math.isnan(value):
            return False
        sign = 1 if self.setting.directions[0] == "minimize" else -1
        better = sum(sign * other < sign * value for other in others)
        count = len(others) + 1
        return count <= self.setting.reduction or better < math.ceil(count / self.setting.reduction)

    def _used_up(self, finished: int) -> None:
        self.claims.study.set_user_attr(USED_UP, finished)
        warnings.warn(
            f"the space is used up after {finished} of {self.setting.trials} trials: nothing but plans that were "
            "measured already came up; add an axis, or ask for fewer trials",
            SearchWarning,
            stacklevel=4,
        )


def _check_start(space: Space, index: int, start: Parameters) -> None:
    trial = FixedTrial(dict(start))
    try:
        with warnings.catch_warnings(action="error", category=UserWarning):
            space.suggest(trial)
    except (ValueError, UserWarning) as error:
        raise InputError(f"start {index} ({dict(start)}) is not in the space: {error}") from error
