import pytest
from small_runs import Given, fresh_states


@pytest.fixture(scope="session")
def given_files(tmp_path_factory):
    return Given(tmp_path_factory.mktemp("given"))


@pytest.fixture
def given(given_files, monkeypatch):
    """What runs on the CPU are given."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    fresh_states()
    return given_files
