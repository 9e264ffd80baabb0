"""The numbers that docs/walkthrough.md shows come from running it."""

import doctest
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_every_number_of_the_walkthrough() -> None:
    results = doctest.testfile(str(DOCS / "walkthrough.md"), module_relative=False)
    assert results.attempted >= 20
    assert results.failed == 0
