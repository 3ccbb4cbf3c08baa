"""Images and what is said of each: of folders, tar shards and data sets."""

import io
import json
import sys
import tarfile
import types

import numpy as np
import pytest
from image_folders import save_images
from PIL import Image

from fewstep.distill.images import DatasetImages, open_images
from fewstep.samplers import InputError


def test_values_of_a_folder(tmp_path):
    names = open_images(str(save_images(tmp_path / "names", ["cat/a.png", "ant/b.jpg"])))
    assert [names.example(index).value for index in range(2)] == [0, 1]
    assert [names.name(index) for index in range(2)] == ["ant/b.jpg", "cat/a.png"]
    texts = save_images(tmp_path / "texts", ["a.png", "b.png"])
    (texts / "a.txt").write_text("a cat\n")
    assert [open_images(str(texts)).example(index).value for index in range(2)] == ["a cat", None]
    lines = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "label": 7}]
    (texts / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [open_images(str(texts)).example(index).value for index in range(2)] == ["one", 7]


def test_words_of_folders(tmp_path):
    with pytest.raises(InputError, match=r"missing does not exist; give a folder of images, a \.tar shard"):
        open_images(str(tmp_path / "missing"))
    with pytest.raises(InputError, match=r"holds no images; fewstep reads \.png"):
        open_images(str(tmp_path))
    folder = save_images(tmp_path / "images", ["a.png"])
    with pytest.raises(InputError, match=r"a\.png is a file; give a folder"):
        open_images(str(folder / "a.png"))
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "x"}')
    with pytest.raises(InputError, match=r"metadata\.jsonl says nothing about a\.png; add a line"):
        open_images(str(folder)).example(0)
    (folder / "metadata.jsonl").write_text("nothing")
    with pytest.raises(InputError, match=r"metadata\.jsonl line 1 is no JSON object with a file_name"):
        open_images(str(folder))


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_webdataset_shards(tmp_path):
    folder = save_images(tmp_path / "images", ["a.png", "b.jpg", "c.png", "d.png"], mode="RGB")
    shards = tmp_path / "shards"
    shards.mkdir()
    extras = [("a.txt", b"a cat\n"), ("b.cls", b"4"), ("c.json", b'{"caption": "a dog"}'), ("d.cls", b"four")]
    for number, names in enumerate((("a.png", "b.jpg"), ("c.png", "d.png"))):
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            for name in names:
                add(tar, name, (folder / name).read_bytes())
                add(tar, *next(extra for extra in extras if extra[0][0] == name[0]))
    images = open_images(str(shards))
    assert [images.name(index) for index in range(4)] == ["0.tar/a", "0.tar/b", "1.tar/c", "1.tar/d"]
    assert [images.example(index).value for index in range(3)] == ["a cat", 4, "a dog"]
    assert np.array_equal(np.asarray(images.example(2).image), np.asarray(Image.open(folder / "c.png")))
    with pytest.raises(InputError, match=r"label of .*1\.tar/d\.png cannot be read"):
        images.example(3)
    assert len(open_images(str(shards / "1.tar"))) == 2
    (shards / "2.tar").write_bytes(b"nothing" * 200)
    with pytest.raises(InputError, match=r"2\.tar is no tar file that can be read"):
        open_images(str(shards))


def test_a_data_set_needs_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"somebody/cats is read by .* pip install 'fewstep\[data\]'"):
        open_images("somebody/cats")


class Rows(list):
    column_names = ("image", "label")


def test_a_data_set_gives_images_with_values(monkeypatch):
    rows = Rows([{"image": Image.new("L", (8, 8), 9), "label": 3}])
    asked = []
    library = types.SimpleNamespace(load_dataset=lambda name, split: asked.append((name, split)) or rows)
    monkeypatch.setitem(sys.modules, "datasets", library)
    images = open_images("somebody/cats", "test")
    assert asked == [("somebody/cats", "test")]
    assert (len(images), images.example(0).value, images.name(0)) == (1, 3, "somebody/cats[test]/0")
    monkeypatch.setattr(Rows, "column_names", ("text",))
    with pytest.raises(InputError, match=r"cats\[train\] has no column of images; it has text"):
        DatasetImages("somebody/cats")

    def fail(name, split):
        raise ValueError("no such split")

    library.load_dataset = fail
    with pytest.raises(InputError, match=r"datasets cannot load somebody/cats\[train\]: no such split"):
        DatasetImages("somebody/cats")
