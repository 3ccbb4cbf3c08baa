"""Opens the database that keeps a study: SQLite for the workers of one machine, PostgreSQL for those of many."""

from __future__ import annotations

import json
import logging
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from alembic.util import CommandError
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from sqlalchemy import URL
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from ..samplers import InputError

LOCK_TIMEOUT_S = 60
"How long a worker waits for another one to finish writing to the same SQLite file."

PAUSES_S = (0.1, 0.2, 0.4, 0.8)
"Pauses between attempts to open a database: two workers that make its tables at the same moment hinder each other."

KEY = "key"
"User attribute of a study: what must be equal to go on with it."

TALKATIVE = ("optuna.storages._rdb.storage", "optuna.storages._in_memory")
"Loggers that announce every study that is created."


def study_url(storage: str | Path) -> str:
    """The SQLAlchemy URL of a study: that of ``study.db`` in a folder, or the URL that was given."""
    return str(storage) if "://" in str(storage) else f"sqlite:///{Path(storage) / 'study.db'}"


def open_storage(url: str, heartbeat_s: int, grace_s: int) -> RDBStorage:
    """Opens the storage of a study, and makes its tables where there are none.

    Args:
        url: ``sqlite:///path`` or ``postgresql+psycopg://user@host/database``.
        heartbeat_s: seconds between two signs of life of a running trial.
        grace_s: seconds without one after which a trial counts as dead.

    Raises:
        InputError: for another kind of URL, a missing driver, or a database that cannot be opened.
    """
    parsed = _parsed(url)
    if parsed.get_backend_name() == "sqlite":
        arguments: dict[str, Any] = {"connect_args": {"timeout": LOCK_TIMEOUT_S}}
    else:
        arguments = {"pool_pre_ping": True}
    for pause in (*PAUSES_S, None):
        try:
            if parsed.get_backend_name() == "sqlite":
                _prepare_file(parsed)
            with quiet():
                return RDBStorage(
                    _template(parsed),
                    engine_kwargs=arguments,
                    heartbeat_interval=heartbeat_s,
                    grace_period=grace_s,
                )
        except ImportError:
            raise InputError(
                f"the driver of the study's storage {parsed} is not installed; pip install 'fewstep[postgres]'"
            ) from None
        except RuntimeError as error:
            raise InputError(f"the study's storage {parsed} is of another version: {error}") from error
        except (SQLAlchemyError, StorageInternalError, sqlite3.Error, CommandError, OSError) as error:
            if pause is None:
                reason = str(error.__cause__ or error).strip().splitlines()[0]
                raise InputError(f"cannot open the study's storage {parsed}: {reason}") from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def open_study(storage: RDBStorage, name: str, directions: Sequence[str], identity: Mapping[str, Any]) -> optuna.Study:
    """Creates a study, or finds the one to go on with.

    Args:
        storage: where it is.
        name: what it is called there.
        directions: ``minimize`` or ``maximize`` for each objective.
        identity: what must be equal to go on with it, as JSON gives it back.

    Raises:
        InputError: when the one that is there is another.
    """
    with quiet():
        with suppress(DuplicatedStudyError):
            storage.create_new_study([StudyDirection[direction.upper()] for direction in directions], name)
        study = optuna.load_study(study_name=name, storage=storage)
    where = f"the study {name!r} in {storage.engine.url}"
    if KEY not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise InputError(f"{where} has trials that are not of a search; give another --study folder")
        study.set_user_attr(KEY, dict(identity))
    difference = _first_difference(study.user_attrs[KEY], identity)
    if difference is not None:
        field, theirs, ours = difference
        raise InputError(
            f"{where} was begun with {field} = {_short(theirs)}, this search has {_short(ours)}; give another --study "
            "folder, or the same settings"
        )
    return study


def _first_difference(theirs: Any, ours: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Dotted name and both values of the first field that differs, in the order of ``ours``."""
    if not (isinstance(theirs, dict) and isinstance(ours, dict)):
        return None if theirs == ours else (name, theirs, ours)
    for key in {**ours, **theirs}:
        inner = f"{name}.{key}" if name else key
        found = _first_difference(theirs.get(key), ours.get(key), inner)
        if found is not None:
            return found
    return None


def _short(value: Any, length: int = 80) -> str:
    text = json.dumps(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _parsed(url: str) -> URL:
    known = "give sqlite:///study.db or postgresql+psycopg://user@host/database"
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InputError(f"the study's storage {url!r} is no URL; {known}") from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise InputError(f"a study is not kept in {parsed.get_backend_name()} ({parsed}); {known}")
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise InputError(f"the study's storage {url!r} would vanish with its worker; {known}")
    return parsed


def _prepare_file(url: URL) -> None:
    """Makes an SQLite file with all tables, whose readers do not wait for a writer.

    It appears under its name when it is complete: tables that are made one by one would lack an index for good, and
    with it the uniqueness of a study's name, if the worker were killed between the two.
    """
    path = Path(str(url.database))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        whole = Path(folder) / path.name
        with closing(sqlite3.connect(whole)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        RDBStorage(_template(url.set(database=str(whole)))).engine.dispose()
        with suppress(FileExistsError):  # another worker was faster
            path.hardlink_to(whole)


def _template(url: URL) -> str:
    """A URL as optuna's storage takes it, where braces mean something."""
    return url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps back what optuna says about heartbeats and new studies; its verbosity stays what the user set."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    for logger in loggers:
        logger.addFilter(_is_warning)
    try:
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_warning)


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING
