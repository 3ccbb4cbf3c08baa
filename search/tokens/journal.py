"""What a search has measured, in a file, so that nothing is measured twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...eval.tokens import Answer
from ...samplers.errors import InputError, first_problem
from ...samplers.files import read_json, write_json
from ...samplers.tokens import Recipe
from .candidates import unnamed
from .tally import Tally

Answering = Callable[[Recipe, range], Sequence[Answer]]
"""From a recipe and the seeds of questions to its answers."""


class Entry(BaseModel):
    """One recipe on some questions.

    Attributes:
        setting: digest of what it was measured in.
        recipe: as JSON data.
        files: digests of the files that it names.
        seeds: of the questions: the first, and one past the last.
        tally: of the answers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    setting: str
    recipe: dict[str, Any]
    files: dict[str, str]
    seeds: tuple[int, int]
    tally: Tally


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = Field(default=1, alias="fewstep_trials")
    result: dict[str, Any] = {}
    measured: dict[str, Entry] = {}
    made: dict[str, str] = {}


def digest(data: Any) -> str:
    """sha256 of JSON data, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """Measurements by what was measured: the setting, the recipe with its files, and the questions.

    Measurements of other settings stay in the file and are not used.

    Args:
        path: of the file; None keeps nothing.
        setting: what answers depend on beside the recipe and the seed: models, lengths, questions; JSON data.

    Raises:
        InputError: when the file holds something else.
    """

    def __init__(self, path: Path | None = None, setting: Any = None) -> None:
        self.path = path
        self.setting = digest(setting)
        self._document = _Document()
        if path is not None and path.exists():
            try:
                self._document = _Document.model_validate(read_json(path))
            except ValidationError as error:
                raise InputError(
                    f"{path} is no journal of a search ({first_problem(error)}); move it away, or name another --out"
                ) from None

    def tally(self, recipe: Recipe, seeds: range, answering: Answering) -> Tally:
        """Of a recipe's answers to some questions, measured where that was not done before."""
        what, files = unnamed(recipe).to_json(), recipe.file_digests()
        key = digest([self.setting, what, files, seeds.start, seeds.stop])
        if key not in self._document.measured:
            self._document.measured[key] = Entry(
                setting=self.setting,
                recipe=what,
                files=files,
                seeds=(seeds.start, seeds.stop),
                tally=Tally.of(answering(recipe, seeds)),
            )
            self._write()
        return self._document.measured[key].tally

    def made(self, what: Any) -> str | None:
        """What `note` was told of something, given as JSON data; None where it was not."""
        return self._document.made.get(digest([self.setting, what]))

    def note(self, what: Any, result: str) -> None:
        """Keeps what something was made into, such as the digest of a file."""
        self._document.made[digest([self.setting, what])] = result
        self._write()

    def conclude(self, result: dict[str, Any]) -> None:
        """Keeps the outcome of the search, JSON data, in place of an earlier one."""
        self._document.result = result
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, self._document.model_dump(mode="json", by_alias=True))
