"""Frozen data in a JSON file that says its own kind and version."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from .errors import InputError, first_problem, unknown_name
from .files import read_json, write_json


class Document(BaseModel):
    """What a user saves, edits and loads: a plan, a recipe.

    A kind of document has a field ``version`` whose alias is ``fewstep_`` and the noun.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    noun: ClassVar[str]
    field_noun: ClassVar[str] = "part"
    current_version: ClassVar[int] = 1

    _folder: Path | None = PrivateAttr(default=None)

    @property
    def folder(self) -> Path | None:
        """The folder of the file that the document was loaded from, where the files that it names are."""
        return self._folder

    def beside(self, folder: str | Path) -> Self:
        """This document as one that was loaded from ``folder``, where the files that it names are."""
        other = self.model_copy()
        other._folder = Path(folder).resolve()
        return other

    @property
    def file_names(self) -> tuple[str, ...]:
        """Files and folders that the document names."""
        return ()

    def file_digests(self) -> dict[str, str]:
        """sha256 of the files that it names, by name; those that are not there (handed over instead) are left out."""
        if self.folder is None:
            return {}
        found: dict[str, str] = {}
        for name in self.file_names:
            path = self.folder / name
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    with file.open("rb") as stream:
                        found[str(file.relative_to(self.folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
        return found

    def __eq__(self, other: object) -> bool:
        """Whether both say the same, wherever they were loaded from."""
        return isinstance(other, type(self)) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        """Equal documents have equal hashes."""
        return hash(json.dumps(self.to_json(), sort_keys=True))

    def to_json(self) -> dict[str, Any]:
        """The document as JSON data, without the fields that are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True) | {
            f"fewstep_{self.noun}": self.current_version
        }

    @classmethod
    def from_json(cls, data: Any, source: str | None = None) -> Self:
        """The document in JSON data.

        Args:
            data: what ``to_json`` gives.
            source: what error messages call it.

        Raises:
            InputError: one line that names the field, the value and the mend.
        """
        source, key = source or cls.noun, f"fewstep_{cls.noun}"
        if not isinstance(data, dict) or key not in data:
            raise InputError(
                f"{source} is not a fewstep {cls.noun}; a {cls.noun} is a JSON object with "
                f'"{key}": {cls.current_version}'
            )
        if data[key] != cls.current_version:
            raise InputError(
                f"{source} has {cls.noun} version {data[key]!r}; this fewstep reads version {cls.current_version}"
            )
        known = {info.alias or name for name, info in cls.model_fields.items()}
        for field in data:
            if field not in known:
                raise InputError(f"{source}: {unknown_name(cls.field_noun, str(field), known)}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(f"{source}: {first_problem(error)}") from None
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads the document from a JSON file.

        Raises:
            InputError: when the file is missing, not JSON, or not a valid document of this kind.
        """
        document = cls.from_json(read_json(Path(path)), str(path))
        document._folder = Path(path).resolve().parent
        return document

    def save(self, path: str | Path) -> None:
        """Writes the document as JSON; the file is complete or absent."""
        write_json(Path(path), self.to_json())
