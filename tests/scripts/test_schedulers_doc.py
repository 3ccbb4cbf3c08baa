"""docs/schedulers.md is what trying every rule on every scheduler says today."""

from pathlib import Path

import pytest
from diffusers import DDIMScheduler

from fewstep.samplers.explicit import explicit_support
from fewstep.samplers.rules import RULES
from fewstep.scripts import schedulers_doc
from fewstep.scripts.schedulers_doc import Row, refusal

DOCUMENT = Path(__file__).parents[2] / "docs" / "schedulers.md"


def test_the_document_is_the_generated_one():
    assert schedulers_doc.document() == DOCUMENT.read_text(encoding="utf-8"), "run python -m fewstep.scripts.tables"


def test_every_scheduler_and_rule_is_in_it():
    text = DOCUMENT.read_text(encoding="utf-8")
    for support in explicit_support():
        assert f"`{support.scheduler}`" in text
    assert all(f"`{rule}`" in text for rule in RULES.names())


def test_a_mark_is_tried_and_not_believed(monkeypatch):
    row = Row("DDIMScheduler", {})
    assert refusal(row, "karras") is None
    assert "epsilon is undefined at SNR 0" in refusal(row, "trailing-zero-snr")
    own = DDIMScheduler.set_timesteps
    monkeypatch.setattr(schedulers_doc, "grid_adapter", lambda scheduler, listed: None)
    assert refusal(row, "karras") == "its timesteps are not those of the rule"
    assert DDIMScheduler.set_timesteps is own


@pytest.mark.parametrize(
    ("told", "listed", "has"),
    [([3.0, 2.5, 2.0], (3.0, 2.0), True), ([2.0, 3.0], (3.0, 2.0), False), ([3.0], (3.0, 2.0), False)],
)
def test_a_listed_time_may_have_others_between(told, listed, has):
    assert schedulers_doc._has(told, listed) is has
