"""The matrix of caches and families is what running them gives, and holds every cache."""

import pytest
from support_matrix import COLUMNS, DOCUMENT, columns, document, verdicts

from fewstep.samplers import CACHES


@pytest.mark.filterwarnings("ignore")
def test_the_document_is_what_the_zoo_gives():
    found = verdicts()
    broken = {(f, c): v.reason for f, row in found.items() for c, v in row.items() if v.part is not None and v.reason}
    assert not broken
    assert DOCUMENT.read_text(encoding="utf-8") == document(found), "run python tests/support_matrix.py"


def test_every_cache_has_a_column():
    assert {"host", *COLUMNS} == set(CACHES.names())
    assert len(columns()) > len(COLUMNS)
