"""Hostile model folders and GGUF files, from a seed: each loads, or one line says why not.

The small form runs in this process. The full form (slow) is 300 folders and 600 files, in a
separate process whose memory is measured.
"""

from pathlib import Path

import pytest

from tests.helpers.hostile import Fuzz, in_a_process
from tests.helpers.import_fuzz import fuzz_folders, fuzz_gguf, fuzz_ternary

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence transformers' warnings about odd files."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")


@pytest.mark.filterwarnings("ignore")  # of libraries, about nonsense
def test_hostile_folders(tmp_path: Path) -> None:
    assert 0 < fuzz_folders(tmp_path, 30, 1) < 20


@pytest.mark.filterwarnings("ignore")
def test_hostile_gguf_files(tmp_path: Path) -> None:
    assert fuzz_gguf(tmp_path / "gguf", 30, 1) < 20


@pytest.mark.filterwarnings("ignore")
def test_hostile_ternary_files(tmp_path: Path) -> None:
    """GGUF of the architecture bitnet, and one-file models."""
    assert fuzz_ternary(tmp_path / "ternary", 30, 1) < 25


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", [fuzz_folders, fuzz_gguf, fuzz_ternary])
def test_many_hostile_files_within_2_gb(tmp_path: Path, fuzz: Fuzz) -> None:
    loaded, gigabytes = in_a_process(fuzz, tmp_path / "full", 300)
    assert loaded < 200
    assert gigabytes < 2
