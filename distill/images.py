"""Images with captions or labels: in a folder, a data set of the library ``datasets``, or webdataset shards."""

from __future__ import annotations

import importlib
import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from ..samplers.errors import InputError
from .encoder import Value

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"What the name of an image ends with."

TEXTS = ("text", "caption", "prompt", "txt")
"What captions are called in data sets and metadata."

LABELS = ("label", "class", "cls")
"What labels are called there."


@dataclass(frozen=True)
class Example:
    """One image.

    Attributes:
        name: for error messages.
        image: decoded, of any size and mode.
        value: its caption or class label, None where it has neither.
    """

    name: str
    image: Image.Image
    value: Value


class Images(ABC):
    """Images by number, in an order that does not change."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def example(self, index: int) -> Example:
        """One of them.

        Raises:
            InputError: when it is no image that can be read.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What distinguishes an image from the others; it does not have to be read for it."""


class First(Images):
    """The first ones of other images.

    Args:
        images: of which.
        count: how many, at most.
    """

    def __init__(self, images: Images, count: int) -> None:
        self.images, self.count = images, min(count, len(images))

    def __len__(self) -> int:
        return self.count

    def example(self, index: int) -> Example:
        return self.images.example(index)

    def name(self, index: int) -> str:
        return self.images.name(index)


def open_images(source: str, split: str = "train") -> Images:
    """Images of a folder, webdataset shards, or a data set.

    A path to a ``.tar`` file or a folder of them holds webdataset shards; a folder that ``datasets`` saved is read by
    it; any other folder holds images. What is no path is the name of a data set.

    Args:
        source: a path, or a name.
        split: of the data set.

    Raises:
        InputError: when there is no image, or the library ``datasets`` is needed and missing.
    """
    path = Path(source)
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        return TarImages(path)
    if path.is_dir() and not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return FolderImages(path)
    if path.is_file():
        raise InputError(f"{path} is a file; give a folder of images, a .tar shard, or the name of a data set")
    if not path.exists() and (path.is_absolute() or source.startswith(".")):
        raise InputError(f"{path} does not exist; give a folder of images, a .tar shard, or the name of a data set")
    return DatasetImages(source, split)


class FolderImages(Images):
    """Images in a folder and the folders in it.

    An image's value is the one in ``metadata.jsonl`` of the folder (``file_name`` with ``text`` or ``label``), or else
    the text file of its name (``cat.txt`` for ``cat.png``), or else the folder it is in: the number that names it, or
    its place among the names where they are no numbers.

    Args:
        folder: the folder.

    Raises:
        InputError: when it holds no images, or its metadata cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.files:
            raise InputError(f"{folder} holds no images; fewstep reads {', '.join(SUFFIXES)}")
        self._known = _metadata(folder / "metadata.jsonl")
        within = sorted({path.parent.name for path in self.files if path.parent != folder})
        numbers = all(name.isdecimal() for name in within)
        self._labels = {name: int(name) if numbers else place for place, name in enumerate(within)}

    def __len__(self) -> int:
        return len(self.files)

    def example(self, index: int) -> Example:
        path = self.files[index]
        try:
            with path.open("rb") as stream:
                return Example(str(path), _decoded(stream, str(path)), self._value(path))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error

    def name(self, index: int) -> str:
        return str(self.files[index].relative_to(self.folder))

    def _value(self, path: Path) -> Value:
        name = path.relative_to(self.folder).as_posix()
        if self._known:
            if name not in self._known:
                raise InputError(f"{self.folder / 'metadata.jsonl'} says nothing about {name}; add a line for it")
            return self._known[name]
        caption = path.with_suffix(".txt")
        if caption.is_file():
            return caption.read_text(encoding="utf-8").strip()
        return self._labels.get(path.parent.name) if path.parent != self.folder else None


class TarImages(Images):
    """Images in webdataset shards: tar files in which the members of one sample share the name before the first dot.

    Captions are members that end with ``.txt``, labels with ``.cls``; both may be in one that ends with ``.json``.

    Args:
        path: a shard, or a folder of them.

    Raises:
        InputError: when there is no image in them, or one is no tar file.
    """

    def __init__(self, path: Path) -> None:
        shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        self._samples: list[tuple[Path, dict[str, tuple[int, int]], str]] = []
        for shard in shards:
            self._samples += [
                (shard, places, key) for key, places in _members(shard).items() if _image_of(places) is not None
            ]
        if not self._samples:
            raise InputError(f"{path} holds no images; fewstep reads {', '.join(SUFFIXES)} in webdataset shards")

    def __len__(self) -> int:
        return len(self._samples)

    def example(self, index: int) -> Example:
        shard, places, key = self._samples[index]
        image = _image_of(places)
        assert image is not None
        name = f"{shard}/{key}{image}"
        decoded = _decoded(io.BytesIO(_bytes(shard, places[image])), name)
        return Example(name, decoded, self._value(shard, places, name))

    def name(self, index: int) -> str:
        shard, _, key = self._samples[index]
        return f"{shard.name}/{key}"

    @staticmethod
    def _value(shard: Path, places: Mapping[str, tuple[int, int]], name: str) -> Value:
        texts = {ending: _bytes(shard, places[ending]) for ending in (".txt", ".cls", ".json") if ending in places}
        try:
            if ".txt" in texts:
                return texts[".txt"].decode().strip()
            if ".cls" in texts:
                return int(texts[".cls"])
            return _value_in(json.loads(texts[".json"])) if ".json" in texts else None
        except ValueError as error:
            raise InputError(f"the caption or label of {name} cannot be read ({error})") from None


class DatasetImages(Images):
    """A data set of the library ``datasets``, by its name or saved in a folder, with a column of images.

    Args:
        name: of the data set, or a folder that ``save_to_disk`` wrote.
        split: which part of it.

    Raises:
        InputError: when the library is missing, or it cannot read the data set.
    """

    def __init__(self, name: str, split: str = "train") -> None:
        try:
            datasets = importlib.import_module("datasets")
        except ImportError:
            raise InputError(
                f"{name} is read by the library datasets, which is not installed; run: pip install 'fewstep[data]'"
            ) from None
        self._name = f"{name}[{split}]"
        try:
            if Path(name).is_dir():
                loaded = datasets.load_from_disk(name)
                self._rows: Any = loaded[split] if hasattr(loaded, "keys") else loaded
            else:
                self._rows = datasets.load_dataset(name, split=split)
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise InputError(f"datasets cannot load {self._name}: {first}; give a folder or the name of one") from error
        self._column = next((key for key in ("image", "img", "jpg", "png") if key in self._rows.column_names), None)
        if self._column is None:
            raise InputError(f"{self._name} has no column of images; it has {', '.join(self._rows.column_names)}")

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> Example:
        name = self.name(index)
        try:
            row = self._rows[index]
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"{name} is no image that can be read ({error}); remove it") from None
        return Example(name, row[self._column], _value_in(row))

    def name(self, index: int) -> str:
        return f"{self._name}/{index}"


def _decoded(stream: BinaryIO, name: str) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(Image.open(stream))
        image.load()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise InputError(f"{name} is no image that can be read ({reason}); remove it") from None
    return image


def _value_in(row: Mapping[str, Any]) -> Value:
    """The caption or label in a row of a data set, None where it has neither."""
    for key in TEXTS:
        if isinstance(row.get(key), str):
            return str(row[key])
    for key in LABELS:
        if isinstance(row.get(key), int):
            return int(row[key])
    return None


def _metadata(path: Path) -> dict[str, Value]:
    if not path.is_file():
        return {}
    known: dict[str, Value] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            known[row["file_name"]] = _value_in(row)
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} line {number} is no JSON object with a file_name; mend it") from None
    return known


def _members(shard: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Of each sample of a shard where its members are: offset and size by ending."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isreg():
                    stem, dot, ending = Path(member.name).name.partition(".")
                    key = str(Path(member.name).parent / stem)
                    found.setdefault(key, {})[dot + ending.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"{shard} is no tar file that can be read ({error}); compressed ones are unpacked first"
        ) from None
    return found


def _image_of(places: Mapping[str, tuple[int, int]]) -> str | None:
    return next((ending for ending in places if ending in SUFFIXES), None)


def _bytes(shard: Path, place: tuple[int, int]) -> bytes:
    with shard.open("rb") as stream:
        stream.seek(place[0])
        return stream.read(place[1])
