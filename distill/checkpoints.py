"""Checkpoints that are complete or absent: ``checkpoint-N/`` of safetensors and JSON, N updates of the student.

A checkpoint is written beside its place under another name, and renamed when the last byte is on the disk. Older
ones are deleted only then. A folder that a killed run left half-written is swept away by the next one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..samplers.errors import InputError
from ..samplers.files import read_json, read_tensors, write_json, write_tensors
from .schedule import Counters

FORMAT = 1
"Version of the layout."

_PREFIX = "checkpoint-"
_ASIDE = ".aside"
_STATE = "state.json"


@dataclass(frozen=True)
class State:
    """All that a run needs to go on as if it had not stopped.

    Batches, noise and dropout depend on the seed and the counters alone, so there is no generator to store.

    Attributes:
        identity: what the run that resumes must have in common, as JSON.
        counters: how far the run is; ``turn`` is the position in the data.
        roles: the tensors of all roles.
        optimisers: moments, by role; roles that were not updated yet are left out.
        scaler: of the gradients in float16, as JSON; empty without one.
    """

    identity: Mapping[str, Any]
    counters: Counters
    roles: Mapping[str, Tensor]
    optimisers: Mapping[str, Mapping[str, Tensor]]
    scaler: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: of the run.
        limit: how many are kept, or None for all.
    """

    folder: Path
    limit: int | None = None

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after ``step`` updates."""
        return self.folder / f"{_PREFIX}{step}"

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        found = (path.parent.name.removeprefix(_PREFIX) for path in self.folder.glob(f"{_PREFIX}*/{_STATE}"))
        return sorted(int(number) for number in found if number.isdecimal())

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def last_good(self) -> str:
        """The newest checkpoint in words, for messages of runs that cannot go on."""
        latest = self.latest()
        return f"the last good checkpoint is {latest}" if latest else "no checkpoint was written yet"

    def save(self, state: State) -> Path:
        """Writes a checkpoint and then deletes those above the limit; an existing one of the same step stays.

        Raises:
            InputError: when it cannot be written. The older ones are untouched then.
        """
        path = self.path(state.counters.step)
        if (path / _STATE).is_file():
            return path
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_ASIDE, dir=self.folder))
        except OSError as error:
            raise self._unwritable(path, error) from error
        try:
            _write(aside, state)
            aside.chmod(0o755)
            aside.rename(path)
            _sync(self.folder)
        except (OSError, InputError) as error:
            raise self._unwritable(path, error) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        for step in self.steps()[: -self.limit] if self.limit else ():
            self._delete(self.path(step))
        return path

    def sweep(self) -> None:
        """Deletes what a killed run left half-written or half-deleted."""
        for path in self.folder.glob(f".{_PREFIX}*{_ASIDE}"):
            shutil.rmtree(path, ignore_errors=True)

    def choose(self, wanted: str | None) -> Path | None:
        """The checkpoint that a run begins with.

        Args:
            wanted: a folder or the name of one in the run's, ``latest``, or None to begin anew.

        Raises:
            InputError: when there is no such checkpoint, or later ones are in the folder already.
        """
        steps = self.steps()
        if wanted is None:
            if steps:
                raise InputError(
                    f"--output_dir {self.folder} holds {self.path(steps[-1]).name} of an earlier run; "
                    "add --resume_from_checkpoint latest or give another folder"
                )
            return None
        if wanted == "latest":
            if not steps:
                raise InputError(
                    f"--resume_from_checkpoint latest: {self.folder} holds no complete checkpoint; "
                    "leave the flag out to begin anew"
                )
            return self.path(steps[-1])
        named = Path(wanted)
        path = named if named.exists() else self.folder / named
        if not (path / _STATE).is_file():
            raise InputError(f"--resume_from_checkpoint {wanted} is no checkpoint (no {_STATE}); give its folder")
        later = [step for step in steps if step > _counters(path).step]
        if later:
            raise InputError(
                f"--resume_from_checkpoint {wanted}: {self.path(later[0])} is later than that; "
                "delete it or give another --output_dir"
            )
        return path

    def _delete(self, path: Path) -> None:
        aside = self.folder / f".{path.name}{_ASIDE}"
        with suppress(OSError):
            path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _unwritable(self, path: Path, error: Exception) -> InputError:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        return InputError(f"cannot write {path}: {reason}; {self.last_good()}")


def load(path: Path) -> State:
    """Reads a checkpoint.

    Raises:
        InputError: when a file is missing or damaged, or another version of fewstep wrote it.
    """
    counters, facts = _counters(path), _facts(path)
    optimisers = {role: read_tensors(path / _optimiser_file(role))[0] for role in facts["optimisers"]}
    roles, _ = read_tensors(path / "roles.safetensors")
    return State(facts["identity"], counters, roles, optimisers, facts["scaler"])


def check_run(path: Path, identity: Mapping[str, Any], updates: int) -> None:
    """Compares a checkpoint with the run that is to go on from it, as far as that is known before its networks are.

    Args:
        path: of the checkpoint.
        identity: what is known of the run's.
        updates: at which it is to end.

    Raises:
        InputError: naming the first field that differs, or when the checkpoint is later than the end.
    """
    saved = _facts(path)["identity"]
    _check_fields(path, {name: saved.get(name) for name in identity}, identity)
    if _counters(path).step > updates:
        raise InputError(f"{path} is later than --max_train_steps {updates}; give at least {_counters(path).step}")


def check_identity(path: Path, saved: State, now: State) -> None:
    """Compares a checkpoint with the run that is to go on from it.

    Raises:
        InputError: naming the first field or tensor that differs.
    """
    _check_fields(path, saved.identity, now.identity)
    for name in sorted(saved.roles.keys() | now.roles.keys()):
        there, here = saved.roles.get(name), now.roles.get(name)
        if there is None or here is None or there.shape != here.shape or there.dtype != here.dtype:
            raise InputError(
                f"{path} holds {_described(there)} as {name}, this run {_described(here)}; "
                "use the same networks or start anew in another --output_dir"
            )


def _check_fields(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    old, new = dict(_leaves(there)), dict(_leaves(here))
    for field in sorted(old.keys() | new.keys(), key=lambda field: (field != "method.type", field)):
        if old.get(field) != new.get(field):
            raise InputError(
                f"{path} was written with {field} = {old.get(field)}, this run has {new.get(field)}; "
                "use the same or start anew in another --output_dir"
            )


def _write(folder: Path, state: State) -> None:
    write_tensors(folder / "roles.safetensors", state.roles)
    for role, tensors in state.optimisers.items():
        write_tensors(folder / _optimiser_file(role), tensors)
    facts = {
        "format": FORMAT,
        "identity": state.identity,
        "counters": asdict(state.counters),
        "optimisers": list(state.optimisers),
        "scaler": state.scaler,
    }
    write_json(folder / _STATE, facts)
    _sync(folder)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _optimiser_file(role: str) -> str:
    return f"optimizer-{role}.safetensors"


def _facts(path: Path) -> Mapping[str, Any]:
    facts = read_json(path / _STATE)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise InputError(f"{path / _STATE} is not of format {FORMAT}; resume with the fewstep that wrote it")
    return facts


def _counters(path: Path) -> Counters:
    try:
        return Counters(**_facts(path)["counters"])
    except (KeyError, TypeError):
        raise InputError(f"{path / _STATE} is damaged; resume from an earlier checkpoint") from None


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _described(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
