"""Workers share a study: which of them measures which plan, and what becomes of the trials of one that died.

A trial is created in one transaction with its plan, so its number is its place in the queue: of two trials with one
plan the lower number measures it, and a trial that has as many others before it as were asked for is one too many.
No worker waits for another to find out.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from .proposals import Proposal
from .study_storage import quiet

PLAN = "plan"
"User attribute of a trial: the key of its plan."

WORKER = "worker"
"User attribute of a trial: the process that runs it."

FAILED = "failed"
"User attribute of a trial: why it has no values."

CONSTRAINTS = "constraints"
"System attribute of a trial that optuna's samplers read the violations of constraints from."

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count, one for each plan, in order: measured to the end, stopped early, or broken.

    Those that a dead worker left, and those that lost a race for a plan, are not among them.
    """
    return study.get_trials(deepcopy=False, states=FINISHED)


@dataclass(frozen=True)
class Standing:
    """How far a study is.

    Attributes:
        finished: the trials that count.
        running: those that other workers are at.
    """

    finished: list[FrozenTrial]
    running: list[FrozenTrial]

    @property
    def plans(self) -> set[str]:
        """Keys of all plans that are measured already or being measured."""
        return {trial.user_attrs[PLAN] for trial in (*self.finished, *self.running)}


@dataclass
class Claims:
    """One worker's view of a study.

    Attributes:
        storage: where the study is.
        study: the study.
        trials: how many finished trials are asked for.
        seen: numbers of the trials of others that were running.
    """

    storage: RDBStorage
    study: optuna.Study
    trials: int
    seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.study_id = self.storage.get_study_id_from_name(self.study.study_name)

    def standing(self) -> Standing:
        """How far the study is, the trials of dead workers failed: those of this machine at once, others when stale."""
        with quiet():
            optuna.storages.fail_stale_trials(self.study)
        trials = self.study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING))
        finished = [trial for trial in trials if trial.state in FINISHED]
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        return Standing(finished, [trial for trial in running if self._is_alive(trial)])

    def claim(self, proposal: Proposal) -> Claim:
        """Creates the trial of a plan; this worker measures it when the claim `holds`."""
        trial = create_trial(
            state=TrialState.RUNNING,
            params=dict(proposal.params),
            distributions=dict(proposal.distributions),
            user_attrs={PLAN: proposal.key, WORKER: this_process()},
            system_attrs=dict(proposal.system_attrs),
        )
        trial_id = self.storage.create_new_trial(self.study_id, template_trial=trial)
        return Claim(self, trial_id, self.storage.get_trial(trial_id).number, proposal.key)

    def _is_alive(self, trial: FrozenTrial) -> bool:
        """Whether a running trial may still have a worker; fails it when not.

        A worker can die before its first heartbeat, and a trial without one is never stale. So each trial gets one
        when it is first seen.
        """
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self.study_id, trial.number)
        if is_dead(trial.user_attrs.get(WORKER)):
            with suppress(UpdateFinishedTrialError):
                self.storage.set_trial_state_values(trial_id, TrialState.FAIL)
            return False
        if trial.number not in self.seen:
            self.storage.record_heartbeat(trial_id)
            self.seen.add(trial.number)
        return True


@dataclass
class Claim:
    """A trial of this worker; as a context it gives signs of life."""

    claims: Claims
    trial_id: int
    number: int
    key: str
    ended: Event = field(default_factory=Event)
    thread: Thread | None = None

    @property
    def holds(self) -> bool:
        """Whether this worker is the one to measure the plan, and the study still needs it."""
        trials = self.claims.study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING))
        others = [t for t in trials if t.number < self.number or t.state in FINISHED]
        return all(t.user_attrs[PLAN] != self.key for t in others) and len(others) < self.claims.trials

    def reports(self, step: int) -> list[float]:
        """What other trials reported at a step; those of dead workers do not count."""
        trials = self.claims.study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING))
        others = [t.intermediate_values for t in trials if t.number != self.number]
        return [values[step] for values in others if step in values]

    def report(self, step: int, value: float) -> None:
        """Reports a value on the way."""
        self.claims.storage.set_trial_intermediate_value(self.trial_id, step, value)

    def tell(
        self,
        state: TrialState,
        values: Sequence[float] | None = None,
        notes: Mapping[str, Any] | None = None,
        violations: Sequence[float] = (),
    ) -> None:
        """Ends the trial. The state comes last, so a worker killed before leaves a trial that does not count."""
        storage = self.claims.storage
        for name, note in (notes or {}).items():
            storage.set_trial_user_attr(self.trial_id, name, note)
        if violations:
            storage.set_trial_system_attr(self.trial_id, CONSTRAINTS, list(violations))
        storage.set_trial_state_values(self.trial_id, state, values)

    def __enter__(self) -> Self:
        self.thread = Thread(target=self._beat, daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        assert self.thread is not None
        self.thread.join()

    def _beat(self) -> None:
        storage = self.claims.storage
        assert storage.heartbeat_interval is not None
        waiting = True
        while waiting:
            with suppress(StorageInternalError):  # the next beat may get through
                storage.record_heartbeat(self.trial_id)
            waiting = not self.ended.wait(storage.heartbeat_interval)
        storage.remove_session()


def this_process() -> dict[str, Any] | None:
    """What tells this process from all others: machine, number, and moment of its start; None without ``/proc``."""
    pid = os.getpid()
    born = _born(pid)
    return None if born is None else {"machine": _machine(), "pid": pid, "born": born}


def is_dead(process: Mapping[str, Any] | None) -> bool:
    """Whether a process of `this_process` is known to have ended; False for one of another machine or user."""
    if process is None or _born(os.getpid()) is None or process["machine"] != _machine():
        return False
    return bool(_born(process["pid"]) != process["born"])


def _machine() -> str:
    """This run of this machine, as this user sees it: in a container or not, and only processes of its own."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()} {os.getuid()}"


def _born(pid: int) -> int | None:
    """When a process was started, in ticks since the machine was; None when there is none that still runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
