"""The public names are frozen: change ``public_names.json`` on purpose, with a line in the changelog."""

import importlib
import json
from pathlib import Path

import pytest

SNAPSHOT = json.loads((Path(__file__).parent / "public_names.json").read_text())


@pytest.mark.parametrize("room", SNAPSHOT)
def test_public_names(room):
    module = importlib.import_module(room)
    assert sorted(module.__all__) == SNAPSHOT[room]
    assert all(hasattr(module, name) for name in module.__all__)
