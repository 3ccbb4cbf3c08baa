"""The package list, the import directions, and what must not be in the repository."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"samplers": 0, "eval": 1, "search": 2, "distill": 2, "scripts": 3}


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_every_subpackage_is_listed():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        "fewstep." + ".".join(init.parent.relative_to(ROOT).parts)
        for top in ROOMS
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert set(config["packages"]) == found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_typed_and_linked_for_type_checkers(room):
    assert (ROOT / room / "py.typed").is_file()
    assert (ROOT / "tests" / ".typing" / "fewstep" / room).resolve() == ROOT / room


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_up_the_table_only(room):
    """samplers knows no other room, eval knows samplers, search and distill know both, nothing imports scripts."""
    for path in (ROOT / room).rglob("*.py"):
        depth = len(path.relative_to(ROOT).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = node.module.split(".")
                other = names[0] if node.level == depth else names[1] if names[0] == "fewstep" else None
                if other in ROOMS and other != room:
                    assert ROOMS[other] < ROOMS[room], f"{path} imports {other}"


def test_nothing_reads_pickles_or_runs_remote_code():
    for path in tracked():
        if path.suffix == ".py" and "tests" not in path.relative_to(ROOT).parts:
            text = path.read_text()
            assert not re.search(r"torch\.load\(|pickle\.load|trust_remote_code\s*=\s*True", text), path


def test_sizes():
    demo = [path for path in tracked() if (ROOT / "eval" / "demo") in path.parents]
    assert sum(path.stat().st_size for path in demo) < 40 * 2**20
    assert [path for path in tracked() if path not in demo and path.stat().st_size > 2**20] == []
