"""Hostile configs, overrides and folders of text, from a seed: each works, or one line says why.

The small form runs in this process. The full form (slow) is 2,000 configs and 200 folders, in a
separate process whose memory is measured.
"""

from pathlib import Path

import pytest

from tests.helpers.hostile import Fuzz, in_a_process
from tests.helpers.input_fuzz import fuzz_configs, fuzz_folders


@pytest.mark.filterwarnings("ignore")  # of libraries, about nonsense
def test_hostile_configs(tmp_path: Path) -> None:
    assert 5 < fuzz_configs(tmp_path, 120, 1) < 100


@pytest.mark.filterwarnings("ignore")
def test_hostile_sources(tmp_path: Path) -> None:
    assert 0 < fuzz_folders(tmp_path, 12, 1) < 12


@pytest.mark.slow
@pytest.mark.parametrize(("fuzz", "count"), [(fuzz_configs, 2000), (fuzz_folders, 200)])
def test_many_hostile_inputs_within_2_gb(tmp_path: Path, fuzz: Fuzz, count: int) -> None:
    worked, gigabytes = in_a_process(fuzz, tmp_path / "full", count)
    assert count // 20 < worked < count
    assert gigabytes < 2
