"""In many steps nothing grows and no line of metrics is lost."""

import runpy
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "docs" / "results" / "soak.py"
SPARE_MB = 8.0
"""What may be held more at the end, of some 420 MB: pools and fragments of a heap that still fill.
Gradients of 900 steps would take 70 MB."""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_nothing_grows(processes: int, tmp_path: Path) -> None:
    rows = runpy.run_path(str(SOAK), run_name="soak")["measure"](1500, processes, tmp_path)
    assert len(rows) == processes
    for row in rows:
        assert row["metrics_whole"] == "yes"
        assert row["samples"] >= 10
        assert row["rss_mb_end"] - row["rss_mb"] < SPARE_MB, row
        assert row["files_end"] <= row["files"], row
        assert row["threads_end"] <= row["threads"], row
