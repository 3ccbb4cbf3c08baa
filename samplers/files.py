"""Files that are complete or absent, and read without pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from .errors import InputError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that replaces it when the block ends well, and vanishes when not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: when the file is missing, unreadable, or not JSON.
    """
    refuse_pickle(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the path of a JSON file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON (line {error.lineno}: {error.msg})") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically, with ``header`` as its metadata."""
    with atomic_path(path) as temporary:
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=dict(header or {}))
        except safetensors.SafetensorError as error:
            raise InputError(f"cannot write {path}: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        InputError: when the file is missing, a pickle, or corrupted.
    """
    refuse_pickle(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the path of a safetensors file")
    try:
        with safetensors.safe_open(path, "pt") as stream:
            header = dict(stream.metadata() or {})
            return {key: stream.get_tensor(key) for key in stream.keys()}, header  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is corrupted ({error}); delete it and make it again") from None


def file_beside(folder: Path | None, who: str, name: str, noun: str) -> Path:
    """The file called ``name`` beside a document.

    Args:
        folder: the document's; None when it was not loaded from a file.
        who: asks, as the user knows it.
        name: its name within the folder.
        noun: the kind of document.

    Raises:
        InputError: when there is no folder, the name leads out of it, or there is no such file.
    """
    if folder is None:
        raise InputError(f"the {who} reads {name!r} beside the {noun}; load the {noun} with {noun.title()}.load(path)")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise InputError(f"the {who} names {name!r}, outside the {noun}'s folder; put it beside the {noun}")
    if not path.is_file():
        raise InputError(f"the {who} names {name!r}, which is not in {folder}; put it there")
    return path


def refuse_pickle(path: Path) -> None:
    """Raises ``InputError`` for a file name that a pickle would have."""
    if path.suffix in {".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin"}:
        raise InputError(f"{path} looks like a pickle, which can run code when loaded; convert it to safetensors first")
